#!/bin/sh
# Make a random password for each user of users.acl that has none yet:
#
#     passwords.sh FOLDER
#
# The folder can be entered by its owner alone. The files can be read by everybody who gets at them:
# containers run as other users than yours, and each is given its own file.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=$1
mkdir -p "$folder"
chmod 700 "$folder"
while read -r word name state _; do
  if [ "$word" = user ] && [ "$state" = on ] && [ ! -e "$folder/$name" ]; then
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$folder/$name.new"
    chmod 644 "$folder/$name.new"
    mv "$folder/$name.new" "$folder/$name"
  fi
done < "$here/users.acl"
