#!/usr/bin/env bash
# safetensors 0.8.0 writes files that nobody but their owner can read, whatever the umask says.
#
# Seen with numpy 2.4.6 on Linux, umask 022: open() makes a file of mode 644, safetensors.numpy.save_file one of 600, and
# so it is under umask 000. Version 0.5.3 makes 644. A model folder written on a shared disk cannot be read by
# others, while its JSON files can; save_pretrained of transformers and PEFT write their weights through it.
# Prints the modes, and exits with 1 if they are no longer these.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
modes() {
    python3 -m venv "$folder/$1"
    "$folder/$1/bin/pip" install -q "safetensors==$1" numpy==2.4.6 2>/dev/null
    (cd "$folder" && "$folder/$1/bin/python" - <<'PYTHON'
import os
import numpy, safetensors
from safetensors.numpy import save_file

found = [safetensors.__version__]
for mask in (0o022, 0o000):
    os.umask(mask)
    open(f"plain{mask}", "w").close()
    save_file({"a": numpy.ones(2)}, f"weights{mask}.safetensors")
    found += [oct(os.stat(name).st_mode & 0o777)[2:] for name in (f"plain{mask}", f"weights{mask}.safetensors")]
    os.remove(f"plain{mask}")
    os.remove(f"weights{mask}.safetensors")
print(*found)
PYTHON
    )
}
new=$(modes 0.8.0)
old=$(modes 0.5.3)
echo "$new"
echo "$old"
[ "$new" = "0.8.0 644 600 666 600" ] && [ "$old" = "0.5.3 644 644 666 666" ]
