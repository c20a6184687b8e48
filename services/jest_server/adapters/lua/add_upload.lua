-- Queues all shards of one upload, once. Their features were written before, under keys of their own.
--
-- KEYS 1 super-batch (hash)  2 in flight (zset)  3 shards (stream)
-- ARGV 1 member of the zset  2 upload field  3 positions (JSON)  4 time to live (ms)  5 job  6 super-batch id  7.. shard ids
-- Returns "accepted", "repeated" or "gone".
if not redis.call('ZSCORE', KEYS[2], ARGV[1]) then
  return 'gone'
end
if redis.call('HSETNX', KEYS[1], ARGV[2], ARGV[3]) == 0 then
  return 'repeated'
end
redis.call('HINCRBY', KEYS[1], 'pending', #ARGV - 6)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
for i = 7, #ARGV do
  redis.call('HSET', KEYS[1], 'shard:' .. ARGV[i], 1)
  redis.call('XADD', KEYS[3], '*', 'job', ARGV[5], 'id', ARGV[6], 'shard', ARGV[i], 'earlier', 0)
end
return 'accepted'
