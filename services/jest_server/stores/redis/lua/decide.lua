-- Records a decision and takes the super-batch out of flight, once. Needs leave_flight.
--
-- KEYS 1 namespace  2 decision (string)  3 index of decisions (zset)  4 dead letters (hash)  5 counters (hash)
--      6 current attempt (hash)
-- ARGV 1 {job, super_batch_id, keep_ms, keep_count: most decisions kept, increments: {counter: amount},
--      attempt: its number} (JSON)
--      2 decision (JSON)
-- Returns the recorded decision, or "dead" or "unknown".
local namespace, decision, index, dead_letters, counters, attempt = unpack(KEYS)
local args = cjson.decode(ARGV[1])
local job, id, keep_ms = args.job, args.super_batch_id, tonumber(args.keep_ms)
local recorded = redis.call('GET', decision)
if recorded then
  return recorded
end
if redis.call('HEXISTS', dead_letters, id) == 1 then
  return 'dead'
end
if not leave_flight(namespace, job, id) then
  return 'unknown'
end
redis.call('SET', decision, ARGV[2], 'PX', keep_ms)
if redis.call('HGET', attempt, 'number') == args.attempt then
  redis.call('HSET', attempt, 'decided', 1)
end
for counter, amount in pairs(args.increments) do
  redis.call('HINCRBY', counters, counter, amount)
end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', index, '-inf', now_ms)
redis.call('ZADD', index, now_ms + keep_ms, id)
for _, old in ipairs(redis.call('ZRANGE', index, 0, -1 - args.keep_count)) do
  redis.call('UNLINK', namespace .. 'decision:' .. job .. '/' .. old)
  redis.call('ZREM', index, old)
end
redis.call('PEXPIRE', index, math.max(keep_ms, redis.call('PTTL', index)))
return ARGV[2]
