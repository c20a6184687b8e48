-- Takes a super-batch out of flight and keeps a letter that tells why, and for some time what was submitted, so that it can
-- be queued again. Needs let_go.
--
-- KEYS 1 dead letters (hash)  2 their order (zset)  3 counters (hash)  4 super-batch (hash)  5 set aside (hash)
-- ARGV 1 job  2 super-batch id  3 letter (JSON)  4 time (s)  5 most letters kept  6 time to live of the letters (ms)
--      7 group  8 prefix of all keys  9 most super-batches kept  10 time to live of these (ms)
-- Returns 1, or 0 if the super-batch was not in flight.
local job, id, prefix = ARGV[1], ARGV[2], ARGV[8]
local submitted = {}
local held = redis.call('HGETALL', KEYS[4])
for i = 1, #held, 2 do
  local kind = string.match(held[i], '^[^:]*')
  if kind ~= 'shard' and kind ~= 'upload' then
    submitted[#submitted + 1] = held[i]
    submitted[#submitted + 1] = held[i + 1]
  end
end
if not let_go(prefix, ARGV[7], job, id) then
  return 0
end
redis.call('HINCRBY', KEYS[3], 'dead_lettered', 1)
redis.call('HINCRBY', KEYS[3], 'in_flight', -1)
redis.call('HSET', KEYS[1], id, ARGV[3])
redis.call('ZADD', KEYS[2], ARGV[4], id)
for i = 1, #submitted, 1000 do -- a call takes a limited number of arguments
  redis.call('HSET', KEYS[5], unpack(submitted, i, math.min(i + 999, #submitted)))
end
redis.call('PEXPIRE', KEYS[5], ARGV[10])
local one_too_many = -1 - tonumber(ARGV[9])
for _, old in ipairs(redis.call('ZRANGE', KEYS[2], one_too_many, one_too_many)) do
  redis.call('UNLINK', prefix .. 'set_aside:' .. job .. '/' .. old)
end
for _, old in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1 - tonumber(ARGV[5]))) do
  redis.call('HDEL', KEYS[1], old)
  redis.call('ZREM', KEYS[2], old)
end
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return 1
