#!/usr/bin/env bash
# rouge-score 0.1.2, nltk 3.10.4: with use_stemmer=True "fly" and "flies" are different words, "universe" and
# "university" the same.
#
# The option is said to use Porter's stemmer, which gives "fli" for both of the first pair. rouge-score stems only words
# of more than three letters, so that one of the pair is stemmed and the other is not: a right answer of one short word
# in another form gets ROUGE-L 0, where without any stemmer it would get 0, too, and with the whole stemmer 1. Words of
# four letters and more fall together as Porter's do, also where they mean other things. Scores of short answers, as
# in Natural Instructions, feel it most.
#
# Seen (ROUGE-L, whether Porter's stems are equal):
#   fly flies 0.0 True | try tried 0.0 True | cry cries 0.0 True | dry dried 0.0 True | city cities 1.0 True
#   universe university 1.0 True | general generous 1.0 True
# Needs: python3 (3.10 or newer), the network for pip (20 MB).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    rouge-score==0.1.2 nltk==3.10.4 absl-py==2.5.0 six==1.17.0 numpy==2.4.6
cd "$work"
cat > words.py <<'PYTHON'
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

PAIRS = [("fly", "flies"), ("try", "tried"), ("cry", "cries"), ("dry", "dried"), ("city", "cities"),
         ("universe", "university"), ("general", "generous")]
rouge, porter = RougeScorer(["rougeL"], use_stemmer=True), PorterStemmer()
print(" | ".join(
    f"{one} {other} {rouge.score(one, other)['rougeL'].fmeasure} {porter.stem(one) == porter.stem(other)}"
    for one, other in PAIRS
))
PYTHON
found=$("$work/venv/bin/python" words.py)
echo "$found"
expected="fly flies 0.0 True | try tried 0.0 True | cry cries 0.0 True | dry dried 0.0 True | city cities 1.0 True"
expected+=" | universe university 1.0 True | general generous 1.0 True"
[ "$found" = "$expected" ] || { echo "not what was seen with these versions: $expected"; exit 1; }
