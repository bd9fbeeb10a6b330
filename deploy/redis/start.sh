#!/bin/sh
# Start Redis with the fleet's users:
#
#     start.sh PASSWORDS [redis-server options]
#
# PASSWORDS is a folder with a file for each user (see passwords.sh), named redis_USER or USER. Redis
# gets the SHA-256 of each. A user without a file has no password and cannot log in.
# REDIS_SERVER names another program, ACL_FILE another place for the users than /tmp/users.acl.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
passwords=$1
shift

umask 077
acl=${ACL_FILE:-/tmp/users.acl}
: > "$acl"
while read -r word name state rest; do
  [ "$word" = user ] || continue
  file=$passwords/redis_$name
  [ -f "$file" ] || file=$passwords/$name
  if [ "$state" = on ] && [ -f "$file" ]; then
    secret=$(cat "$file")
    if [ "${#secret}" -lt 32 ]; then
      echo "start.sh: the password in $file is shorter than 32 characters" >&2
      exit 1
    fi
    hash=$(printf %s "$secret" | sha256sum)
    rest="#${hash%% *} $rest"
  fi
  echo "user $name $state $rest" >> "$acl"
done < "$here/users.acl"

exec "${REDIS_SERVER:-redis-server}" "$here/redis.conf" --aclfile "$acl" "$@"
