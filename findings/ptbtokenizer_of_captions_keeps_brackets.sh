#!/usr/bin/env bash
# pycocoevalcap 1.2 (Stanford CoreNLP 3.4.1, Java 17): punctuation goes from captions, brackets stay as words.
#
# The tokenizer that every published CIDEr, BLEU and METEOR of captions goes through takes out a list of signs, -LRB- and
# -RRB- among them, which stand for brackets. But it has Stanford's tokenizer lower the case first, and -lrb- is not in
# the list. So "(left)" is three words, and a caption that lacks the reference's brackets loses for it.
#
# Seen:
#   a man -lrb- left -rrb- waves to a child
#   CIDEr of the same words without brackets: 4.6 of 10
# Needs: python3 (3.10 or newer), java, the network for pip (100 MB; pycocotools is not installed).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check numpy==2.4.6
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps pycocoevalcap==1.2
cd "$work"
cat > brackets.py <<'PYTHON'
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

references = {0: [{"caption": "A man (left) waves to a child."}], 1: [{"caption": "A red bus waits, at the stop!"}]}
said = {0: [{"caption": "A man left waves to a child"}], 1: [{"caption": "A red bus waits at the stop"}]}
references, said = (PTBTokenizer().tokenize(captions) for captions in (references, said))
print(references[0][0])
print(f"CIDEr of the same words without brackets: {Cider().compute_score(references, said)[1][0]:.1f} of 10")
PYTHON
said=$("$work/venv/bin/python" brackets.py 2>/dev/null)
echo "$said"
[ "$said" = "a man -lrb- left -rrb- waves to a child
CIDEr of the same words without brackets: 4.6 of 10" ]
