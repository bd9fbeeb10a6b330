#!/bin/sh
# Start Redis with the fleet's users:
#
#     start.sh PASSWORDS [redis-server options]
#
# PASSWORDS is a folder with a file for each user (see passwords.sh), named redis_USER or USER. Redis
# gets the SHA-256 of each. A user without a file has no password and cannot log in.
# --dir FOLDER is where Redis keeps its file, in place of the folder in redis.conf.
# REDIS_SERVER and REDIS_CHECK_AOF name other programs, ACL_FILE a place for the users instead of
# a folder of its own below TMPDIR (/tmp).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
passwords=$1
shift

umask 077
# Nobody else may have put a file or a link there: the folder is new, and so is the file.
acl=${ACL_FILE:-$(mktemp -d "${TMPDIR:-/tmp}/vecfleet-redis.XXXXXX")/users.acl}
rm -f -- "$acl"
set -C
: > "$acl"
set +C
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

# After a power cut the file may end in half a transaction. Redis would leave it there, and carry it out
# at a later start. Bytes that belong to no command are left for Redis to refuse.
check=${REDIS_CHECK_AOF:-redis-check-aof}
damaged='format error|Expected prefix|Expected \\r\\n, got: (0[1-9a-f]|[1-9a-f].)(0[1-9a-f]|[1-9a-f].)'
data=$(sed -n 's/^dir //p' "$here/redis.conf")
left_out=
last=
for option in "$@"; do
  case $last in
    --[Dd][Ii][Rr]) data=$option left_out='/^dir /d' ;;
  esac
  last=$option
done
for file in "$data/appendonlydir/appendonly.aof.manifest" "$data/appendonly.aof"; do
  [ -f "$file" ] || continue
  found=$("$check" "$file" < /dev/null) && continue
  torn='AOF analyzed: (filename=[^ ]*\.incr\.aof, )?size=.* diff=[1-9]'
  if printf %s "$found" | grep -Eq "$torn" && ! printf %s "$found" | grep -Eq "$damaged"; then
    echo "start.sh: $file ends in half a transaction, which is cut off" >&2
    echo y | "$check" --fix "$file"
  fi
done

# Redis would enter the folder of redis.conf first, and end where there is none.
exec "${REDIS_SERVER:-redis-server}" - --aclfile "$acl" "$@" << END
$(sed "$left_out" "$here/redis.conf")
END
