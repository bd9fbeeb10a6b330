-- Renew the leases of all jobs in flight and the worker's sign of life.
--
-- KEYS  1 rq:worker:{worker} hash   2 vf:worker:{worker} hash   3 rq:workers set
--       4 vf:models zset   5 vf:model:{name} string   then vf:live:{pool} zset, one a pool
--       the rest as the ledger names them
-- ARGV  1 worker   2 time, ISO 8601   3 lease, ms   4 worker's TTL, s   5 model's TTL, s
--       6 model's name or ''   7 its card (msgpack)   8 how many pools   9 how many fields
--       then the fields (name, value) of vf:worker, then for each job: id, execution, queue
-- Returns the executions that are no longer ours, or that nobody waits for any more and no worker
--       has died of: what runs of those may be stopped, and is then settled
local worker, iso, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local worker_ttl_s, model_ttl_s, model = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local pools, fields = tonumber(ARGV[8]), tonumber(ARGV[9])
local seconds, expiry = text(now_ms / 1000), text(now_ms + lease_ms)

redis.call('EXPIRE', KEYS[1], worker_ttl_s)
redis.call('HSET', KEYS[1], 'last_heartbeat', iso)
redis.call('EXPIRE', KEYS[1], worker_ttl_s)
redis.call('SADD', KEYS[3], KEYS[1])
if fields > 0 then
  redis.call('HSET', KEYS[2], unpack(ARGV, 10, 9 + 2 * fields))
  redis.call('EXPIRE', KEYS[2], worker_ttl_s)
end
if model ~= '' then
  redis.call('ZADD', KEYS[4], text(now_ms), model)
  redis.call('SET', KEYS[5], ARGV[7], 'EX', model_ttl_s)
end
for k = 6, 5 + pools do
  redis.call('ZADD', KEYS[k], expiry, worker)
  redis.call('ZREMRANGEBYSCORE', KEYS[k], '-inf', text(now_ms))
  redis.call('EXPIRE', KEYS[k], worker_ttl_s)  -- pools go, with models and collections
end

local lost = {}
for at = 10 + 2 * fields, #ARGV, 3 do
  local id, execution, queue = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local member, lease = id .. ':' .. execution, 'vf:lease:' .. queue
  local until_ms = redis.call('ZSCORE', lease, member)
  if until_ms and tonumber(until_ms) > 0 then  -- one that was abandoned is over
    redis.call('ZADD', lease, 'XX', expiry, member)
    redis.call('HSET', 'rq:execution:' .. member, 'last_heartbeat', seconds)
    redis.call('EXPIRE', 'rq:execution:' .. member, math.ceil(lease_ms / 1000))
    redis.call('ZADD', 'rq:executions:' .. id, text(now_ms / 1000 + lease_ms / 1000 + 60), execution)
    redis.call('EXPIRE', 'rq:executions:' .. id, math.ceil(lease_ms / 1000) + 60)
    redis.call('HSET', 'rq:job:' .. id, 'last_heartbeat', iso)
    local told = redis.call('HMGET', 'rq:job:' .. id, 'vf_left', 'vf_at')
    if told[1] and not told[2] then lost[#lost + 1] = execution end
  else
    lost[#lost + 1] = execution
  end
end
return lost
