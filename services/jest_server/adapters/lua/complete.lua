-- Hands a shard's result in: stores it, acknowledges the shard and tells the news; a second result is only acknowledged.
--
-- KEYS 1 shards (stream)  2 super-batch (hash)  3 in flight (zset)  4 results (hash)  5 features (string)  6 news (stream)
-- ARGV 1 group  2 entry id  3 member of the zset  4 shard id  5 result  6 time to live (ms)  7 job  8 super-batch id
-- Returns 1 if the result was stored, else 0.
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
redis.call('UNLINK', KEYS[5])
if not redis.call('ZSCORE', KEYS[3], ARGV[3]) or redis.call('HSETNX', KEYS[4], ARGV[4], ARGV[5]) == 0 then
  return 0
end
redis.call('PEXPIRE', KEYS[4], ARGV[6])
redis.call('HINCRBY', KEYS[2], 'pending', -1)
redis.call('XADD', KEYS[6], 'MAXLEN', '~', 4096, '*', 'job', ARGV[7], 'id', ARGV[8])
return 1
