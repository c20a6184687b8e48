-- Queues all shards of one upload, once. Their features were written before, under keys of their own that end soon; here
-- they get the super-batch's time to live, or are taken away again if nobody is going to score them.
--
-- KEYS 1 super-batch (hash)  2 in flight (zset)  3 shards (stream)  4.. features (string) of each shard
-- ARGV 1 member of the zset  2 upload field  3 positions (JSON)  4 job  5 super-batch id  6.. shard ids, as many as features
-- Returns "accepted", "repeated" or "gone", or "lost" if features are missing; only "accepted" changes the queue.
local job, id = ARGV[4], ARGV[5]
local gone = not redis.call('ZSCORE', KEYS[2], ARGV[1])
if gone or redis.call('HEXISTS', KEYS[1], ARGV[2]) == 1 then
  for i = 6, #ARGV do
    if gone or redis.call('HEXISTS', KEYS[1], 'shard:' .. ARGV[i]) == 0 then
      redis.call('UNLINK', KEYS[i - 2])
    end
  end
  return gone and 'gone' or 'repeated'
end
for i = 4, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    return 'lost'
  end
end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
local lives_ms = redis.call('PTTL', KEYS[1])
for i = 6, #ARGV do
  local entry = redis.call('XADD', KEYS[3], '*', 'job', job, 'id', id, 'shard', ARGV[i], 'earlier', 0)
  redis.call('HSET', KEYS[1], 'shard:' .. ARGV[i], entry)
  redis.call('PEXPIRE', KEYS[i - 2], lives_ms)
end
return 'accepted'
