"""Prints the command that README.md marks with <!-- MARKER -->: python .ci/readme.py MARKER."""

import pathlib
import re
import sys

found = re.search(rf"<!-- {sys.argv[1]} -->\s*```bash\n(.*?)```", pathlib.Path("README.md").read_text(), re.S)
if not found:
    sys.exit(f"README.md marks no command with <!-- {sys.argv[1]} -->")
print(found[1].strip())
