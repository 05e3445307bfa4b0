# Sourced by what fetches data out of packages. A package is laid down whole or not at all.

# debian FOLDER PACKAGE NAME: usr/share/NAME of a Debian package, unpacked under FOLDER.
debian() {
    [ -d "$1/usr/share/$3" ] && return
    echo "Debian: $2"
    rm -rf "$1/$2.partial"
    mkdir -p "$1/$2.partial" "$(dirname "$1/usr/share/$3")"
    (cd "$1/$2.partial" && apt-get download -qq "$2" && dpkg-deb -x "$2"_*.deb .)
    mv "$1/$2.partial/usr/share/$3" "$1/usr/share/$3"
    rm -rf "$1/$2.partial"
}
