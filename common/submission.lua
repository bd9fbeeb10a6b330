-- Open a submission, or tell how many blocks it has; a closed one that is complete becomes done.
--
-- KEYS  1 vf:sub:{sub} hash   2 vf:sub:{sub}:ok bitmap   3 vf:sub:{sub}:bad bitmap
--       4 vf:sub:{sub}:errors list
-- ARGV  1 blocks, or '' to open   2 documents   3 TTL, s   then names and values to keep
-- Returns the submission's state
-- A full Redis refuses to open one, but not to close it: that is what ends the work that fills it.
if ARGV[1] ~= '' then redis.call('EXPIRE', KEYS[1], ARGV[3]) end
local time = redis.call('TIME')
local now_ms = string.format('%.0f', time[1] * 1000 + time[2] / 1000)
if redis.call('HSETNX', KEYS[1], 'state', 'open') == 1 then
  redis.call('HSET', KEYS[1], 'created_ms', now_ms)
end
for at = 4, #ARGV, 2 do redis.call('HSETNX', KEYS[1], ARGV[at], ARGV[at + 1]) end
local state = redis.call('HGET', KEYS[1], 'state')
if ARGV[1] ~= '' and state == 'open' then
  redis.call('HSET', KEYS[1], 'blocks', ARGV[1], 'documents', ARGV[2])
  local settled = redis.call('BITCOUNT', KEYS[2]) + redis.call('BITCOUNT', KEYS[3])
  state = settled >= tonumber(ARGV[1]) and 'done' or 'closed'
  redis.call('HSET', KEYS[1], 'state', state)
  if state == 'done' then redis.call('HSET', KEYS[1], 'done_ms', now_ms) end
end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[3]) end
return state
