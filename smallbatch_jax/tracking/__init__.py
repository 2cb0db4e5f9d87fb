"""TensorBoard and Weights & Biases, fed from the stored rows.

May import `store` and `config`.
"""
