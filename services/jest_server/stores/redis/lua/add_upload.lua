-- Queues all shards of one upload, once. Their features were written before, under keys of their own that end soon; here
-- they get the super-batch's time to live, or are taken away again if nobody is going to score them. Needs turns and usage.
--
-- KEYS 1 super-batch (hash)  2 in flight (zset)  3 queued (zset)  4 usage (hash)  5 lines (hash)
--      6.. features (string) of each shard
-- ARGV 1 member of the zset  2 upload field  3 positions (JSON)  4 job  5 super-batch id  6 prefix of all keys
--      7, 8, 9 most bytes of a job, a tenant, the server (0: any)  10 now (ms)  11 line  12 what the line is for (JSON)
--      13.. shard ids, as many as features
-- Returns "accepted", "repeated" or "gone"; "job", "tenant" or "server" if that is full; or "lost" if features are
-- missing. Only "accepted" changes the queue.
local super_batch, job, id, prefix, line = KEYS[1], ARGV[4], ARGV[5], ARGV[6], ARGV[11]
local FEATURES, SHARDS = 5, 12
local refused = nil
local deadline = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not deadline then
  refused = 'gone'
elseif redis.call('HEXISTS', super_batch, ARGV[2]) == 1 then
  refused = 'repeated'
end
local bytes = 0
if not refused then
  for i = FEATURES + 1, #KEYS do
    local size = redis.call('STRLEN', KEYS[i])
    if size == 0 then
      return 'lost'
    end
    bytes = bytes + size
  end
  local limits = {job = tonumber(ARGV[7]), tenant = tonumber(ARGV[8]), server = tonumber(ARGV[9])}
  refused = who_is_full(KEYS[4], 'bytes', job, bytes, limits)
end
if refused then
  for i = SHARDS + 1, #ARGV do
    if refused == 'gone' or redis.call('HEXISTS', super_batch, 'shard:' .. ARGV[i]) == 0 then
      redis.call('UNLINK', KEYS[i - SHARDS + FEATURES])
    end
  end
  return refused
end
redis.call('HSET', super_batch, ARGV[2], ARGV[3])
local lives_ms = redis.call('PTTL', super_batch)
if bytes > 0 then
  account(KEYS[4], 'bytes', job, id, bytes)
  redis.call('HSET', KEYS[5], line, ARGV[12])
end
for i = SHARDS + 1, #ARGV do
  local shard = id .. '/' .. ARGV[i]
  redis.call('HSET', super_batch, 'shard:' .. ARGV[i], 'waiting:0')
  redis.call('ZADD', KEYS[3], ARGV[10], job .. '/' .. shard)
  put_in_line(prefix, line, job, shard, deadline)
  redis.call('PEXPIRE', KEYS[i - SHARDS + FEATURES], lives_ms)
end
return 'accepted'
