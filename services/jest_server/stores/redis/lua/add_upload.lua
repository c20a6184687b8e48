-- Queues all shards of one upload, once. Their features were written before, under keys of their own with a short life; here
-- they get the super-batch's time to live, or are deleted again if they are not to be scored. Needs fair_queue and usage.
--
-- KEYS 1 namespace  2 super-batch (hash)  3 in flight (zset)  4 queued (zset)  5 usage (hash)  6 model queues (hash)
--      7.. features (string) of each shard
-- ARGV 1 {job, super_batch_id, rank, digest, positions (JSON), shards: [id, ...] in the order of the features, queue,
--      model: what the queue is for (JSON), now_ms, limits: {job, tenant, server} of bytes, 0 for none} (JSON)
-- Returns "accepted", "repeated" or "gone"; "job", "tenant" or "server" if that is full; or "lost" if features are
-- missing. Only "accepted" changes the queue.
local namespace, super_batch, in_flight, queued, usage, model_queues = unpack(KEYS, 1, 6)
local FEATURES = 6
local args = cjson.decode(ARGV[1])
local job, id = args.job, args.super_batch_id
local field = 'upload:' .. args.rank .. ':' .. args.digest
local deadline = redis.call('ZSCORE', in_flight, job .. '/' .. id)
local refused, bytes = nil, 0
if not deadline then
  refused = 'gone'
elseif redis.call('HEXISTS', super_batch, field) == 1 then
  refused = 'repeated'
else
  for i in ipairs(args.shards) do
    local size = redis.call('STRLEN', KEYS[FEATURES + i])
    if size == 0 then
      return 'lost'
    end
    bytes = bytes + size
  end
  refused = first_exceeded(usage, 'bytes', job, bytes, args.limits)
end
if refused then
  for i, shard_id in ipairs(args.shards) do
    if refused == 'gone' or redis.call('HEXISTS', super_batch, 'shard:' .. shard_id) == 0 then
      redis.call('UNLINK', KEYS[FEATURES + i])
    end
  end
  return refused
end
redis.call('HSET', super_batch, field, args.positions)
if bytes > 0 then
  add_usage(usage, 'bytes', job, id, bytes)
  redis.call('HSET', model_queues, args.queue, args.model)
end
local lives_ms = redis.call('PTTL', super_batch)
for i, shard_id in ipairs(args.shards) do
  local shard = id .. '/' .. shard_id
  redis.call('HSET', super_batch, 'shard:' .. shard_id, 0)
  redis.call('ZADD', queued, args.now_ms, job .. '/' .. shard)
  enqueue(namespace, args.queue, job, shard, deadline)
  redis.call('PEXPIRE', KEYS[FEATURES + i], lives_ms)
end
return 'accepted'
