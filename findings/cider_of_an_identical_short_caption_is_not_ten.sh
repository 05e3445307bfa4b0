#!/usr/bin/env bash
# pycocoevalcap 1.2: a caption that equals its reference gets 10 from four words on; one of three words gets 7.5.
#
# CIDEr-D is the mean over n-grams of length 1 to 4, and a caption without any n-gram of a length gets 0 for it. So the
# highest score of a test set depends on how long its references are: answers of one word, as in visual question
# answering, end at 2.5. And one picture by itself gets 0 whatever is said about it, because an n-gram's weight is the
# logarithm of pictures over pictures that have it.
#
# Seen:
#   1 words: 2.5
#   2 words: 5.0
#   3 words: 7.5
#   4 words: 10.0
#   one picture alone: 0.0
# Needs: python3 (3.10 or newer), the network for pip (a few MB; pycocotools is not installed).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check numpy==2.4.6
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps pycocoevalcap==1.2
cd "$work"
cat > short.py <<'PYTHON'
from pycocoevalcap.cider.cider import Cider

captions = {0: ["dog"], 1: ["red bus"], 2: ["two men talking"], 3: ["children on a beach"]}
_, scores = Cider().compute_score(captions, captions)
for caption, score in zip(captions.values(), scores):
    print(f"{len(caption[0].split())} words: {score:.1f}")
alone = {3: captions[3]}
print(f"one picture alone: {Cider().compute_score(alone, alone)[0]:.1f}")
PYTHON
said=$("$work/venv/bin/python" short.py)
echo "$said"
[ "$said" = "1 words: 2.5
2 words: 5.0
3 words: 7.5
4 words: 10.0
one picture alone: 0.0" ]
