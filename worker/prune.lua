-- Take out of the dead letter what its time is over for: Redis has forgotten the entries themselves.
--
-- KEYS  none of its own
-- ARGV  the queues' names
-- also  rq:failed:{queue} zset, vf:dead hash, vf:dead:hours hash, vf:dead:due zset (as the ledger
--       counts)
-- Returns queue, number of entries and so on, of those queues where there were any
local MOST = 200  -- hours of tenants in one call
local now_s = tonumber(redis.call('TIME')[1])
local gone = {}
for _, queue in ipairs(ARGV) do
  local count = redis.call('ZREMRANGEBYSCORE', 'rq:failed:' .. queue, '-inf', now_s)
  if count > 0 then gone[#gone + 1], gone[#gone + 2] = queue, count end
end
local over = redis.call('ZRANGEBYSCORE', 'vf:dead:due', '-inf', math.floor(now_s / 3600), 'LIMIT', 0,
  MOST)
for _, name in ipairs(over) do
  redis.call('ZREM', 'vf:dead:due', name)
  local bytes = tonumber(redis.call('HGET', 'vf:dead:hours', name) or 0)
  redis.call('HDEL', 'vf:dead:hours', name)
  for _, whose in ipairs({string.match(name, ':(.*)$'), '*'}) do
    if redis.call('HINCRBY', 'vf:dead', whose, string.format('%.0f', 0 - bytes)) <= 0 then
      redis.call('HDEL', 'vf:dead', whose)
    end
  end
end
return gone
