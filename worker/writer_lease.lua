-- Take, renew or remove the lease on writing one home's index.
--
-- KEYS  1 vf:writer:{home} string   2 a key that never is (see "take")
-- ARGV  1 "take", "renew" or "remove"   2 holder   3 lease, ms
-- Returns 0 when the holder does not have the lease (of "remove": did not); else 1, of "take" its time
--       in us. That is the fencing token: taken later, a frozen holder's might pass its heir's.
local action, holder, lease_ms = ARGV[1], ARGV[2], ARGV[3]

if action == 'take' then
  -- A full Redis refuses a script whose first write may need memory; after a DEL the rest passes. So
  -- an aggregator can come back to a full Redis, and make room.
  redis.call('DEL', KEYS[2])
  local time = redis.call('TIME')
  local taken = redis.call('SET', KEYS[1], holder, 'NX', 'PX', lease_ms)
  return taken and time[1] * 1000000 + time[2] or 0
end
if redis.call('GET', KEYS[1]) ~= holder then return 0 end
if action == 'renew' then return redis.call('PEXPIRE', KEYS[1], lease_ms) end
return redis.call('DEL', KEYS[1])
