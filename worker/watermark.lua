-- The version below which nothing can arrive any more in a collection that assigns versions.
--
-- KEYS  1 vf:outstanding:{uid} zset   2 vf:version:{uid} string   and rq:job:{id} hash, one a member
-- ARGV  1 most members to look at
-- Returns the version, or 0 where it cannot be told yet
for _ = 1, tonumber(ARGV[1]) do
  local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
  if #first == 0 then
    return tonumber(redis.call('GET', KEYS[2]) or -1) + 1
  end
  if redis.call('EXISTS', 'rq:job:' .. first[1]) == 1 then return tonumber(first[2]) end
  redis.call('ZREM', KEYS[1], first[1])
end
return 0
