#!/usr/bin/env bash
# WordNet 3.0, Debian's wordnet-base 1:3.0-37. cntlist.rev says how often each sense was met in the tagged texts, by a
# key LEMMA%POS:... A lemma of it may be missing in the index of its part of speech: 733 of 37,387 keys, 2 %, so that
# looking one up by its count fails ("hills", a noun there, has no line in index.noun).
#
# Guess: every counted sense is one that the database has, as its manual, cntlist(5WN), leads to expect.
#
# Seen:
#   37387 counted senses, 733 of lemmas without an index line; hills: counted as a noun 16 times, in index.noun: False
# Needs: Debian with its package lists, python3, the network (6 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download -qq wordnet-base=1:3.0-37
dpkg-deb -x wordnet-base_*.deb .
python3 - <<'PY'
from pathlib import Path

root = Path("usr/share/wordnet")
parts = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
known = {
    part: {line.split()[0] for line in (root / f"index.{part}").read_text().splitlines() if not line.startswith("  ")}
    for part in set(parts.values())
}
counted = [line.split() for line in (root / "cntlist.rev").read_text().splitlines()]
lost = [key for key, _, _ in counted if key.partition("%")[0] not in known[parts[key.partition("%")[2][0]]]]
(times,) = [int(n) for key, _, n in counted if key.startswith("hills%1:")]
print(f"{len(counted)} counted senses, {len(lost)} of lemmas without an index line; "
      f"hills: counted as a noun {times} times, in index.noun: {'hills' in known['noun']}")
assert (len(counted), len(lost), "hills" in known["noun"]) == (37387, 733, False)
PY
