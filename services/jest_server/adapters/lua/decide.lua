-- Records a decision and takes the super-batch out of flight, once.
--
-- KEYS 1 decision (string)  2 super-batch (hash)  3 dead letters (hash)  4 in flight (zset)  5 counters (hash)
--      6 results (hash)  7 news (stream)
-- ARGV 1 member of the zset  2 super-batch id  3 decision (JSON)  4 keep (ms)  5 job  6 prefix of the features' keys
--      7.. counter, increment pairs
-- Returns the recorded decision, or "dead" or "unknown".
local recorded = redis.call('GET', KEYS[1])
if recorded then
  return recorded
end
if redis.call('HEXISTS', KEYS[3], ARGV[2]) == 1 then
  return 'dead'
end
if not redis.call('ZSCORE', KEYS[4], ARGV[1]) then
  return 'unknown'
end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
for i = 7, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[5], ARGV[i], ARGV[i + 1])
end
redis.call('ZREM', KEYS[4], ARGV[1])
for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
  if string.sub(field, 1, 6) == 'shard:' then
    redis.call('UNLINK', ARGV[6] .. string.sub(field, 7))
  end
end
redis.call('UNLINK', KEYS[2], KEYS[6])
redis.call('XADD', KEYS[7], 'MAXLEN', '~', 4096, '*', 'job', ARGV[5], 'id', ARGV[2])
return ARGV[3]
