-- Records a decision and takes the super-batch out of flight, once. Needs let_go.
--
-- KEYS 1 decision (string)  2 index of decisions (zset)  3 dead letters (hash)  4 counters (hash)
-- ARGV 1 job  2 super-batch id  3 decision (JSON)  4 keep (ms)  5 group  6 prefix of all keys  7 most decisions kept
--      8.. counter, increment pairs
-- Returns the recorded decision, or "dead" or "unknown".
local job, id, decision, keep_ms = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local recorded = redis.call('GET', KEYS[1])
if recorded then
  return recorded
end
if redis.call('HEXISTS', KEYS[3], id) == 1 then
  return 'dead'
end
if not let_go(ARGV[6], ARGV[5], job, id) then
  return 'unknown'
end
redis.call('SET', KEYS[1], decision, 'PX', keep_ms)
for i = 8, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[4], ARGV[i], ARGV[i + 1])
end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now_ms)
redis.call('ZADD', KEYS[2], now_ms + keep_ms, id)
for _, old in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1 - tonumber(ARGV[7]))) do
  redis.call('UNLINK', ARGV[6] .. 'decision:' .. job .. '/' .. old)
  redis.call('ZREM', KEYS[2], old)
end
redis.call('PEXPIRE', KEYS[2], math.max(keep_ms, redis.call('PTTL', KEYS[2])))
return decision
