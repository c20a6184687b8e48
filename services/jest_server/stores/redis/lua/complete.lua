-- Stores a shard's result, takes the shard out of the queue and publishes an event; a second result is ignored. Needs
-- fair_queue and usage.
--
-- It starts with ZREM, which Redis runs when its memory is full: then the rest runs, too.
--
-- KEYS 1 namespace  2 heartbeats of the queue (zset)  3 super-batch (hash)  4 results (hash)  5 features (string)
--      6 events (stream)  7 queued (zset)  8 usage (hash)
-- ARGV 1 {queue, job, super_batch_id, shard_id} (JSON)  2 result
-- Returns 1 if the result was stored, else 0.
local namespace, heartbeats, super_batch, results, features, events, queued, usage = unpack(KEYS)
local args = cjson.decode(ARGV[1])
local job, id, shard_id = args.job, args.super_batch_id, args.shard_id
local member = job .. '/' .. id .. '/' .. shard_id
local was_claimed = redis.call('ZREM', heartbeats, member) == 1
if redis.call('HDEL', super_batch, 'shard:' .. shard_id) == 0 then
  return 0
end
redis.call('HDEL', super_batch, 'claimed_by:' .. shard_id)
if not was_claimed then -- it was released in the meantime
  dequeue(namespace, args.queue, job, id .. '/' .. shard_id)
end
redis.call('ZREM', queued, member)
add_usage(usage, 'bytes', job, id, -redis.call('STRLEN', features))
redis.call('UNLINK', features)
redis.call('HSET', results, shard_id, ARGV[2])
redis.call('PEXPIRE', results, redis.call('PTTL', super_batch))
redis.call('XADD', events, 'MAXLEN', '~', 4096, '*', 'job', job, 'id', id)
return 1
