-- Puts a shard that is still the consumer's back into its queue; this delivery is not counted. Needs fair_queue and claims.
--
-- KEYS 1 namespace  2 heartbeats of the queue (zset)  3 super-batch (hash)  4 in flight (zset)
-- ARGV 1 {queue, consumer, job, super_batch_id, shard_id} (JSON)
-- Returns 1 if it was put back, else 0.
local namespace, heartbeats, super_batch, in_flight = unpack(KEYS)
local args = cjson.decode(ARGV[1])
local id = args.job .. '/' .. args.super_batch_id
local member = id .. '/' .. args.shard_id
if drop_if_expired(namespace, heartbeats, member)
  or redis.call('HGET', super_batch, 'claimed_by:' .. args.shard_id) ~= args.consumer then
  return 0
end
redis.call('ZREM', heartbeats, member)
redis.call('HDEL', super_batch, 'claimed_by:' .. args.shard_id)
redis.call('HINCRBY', super_batch, 'shard:' .. args.shard_id, -1)
local deadline = redis.call('ZSCORE', in_flight, id)
enqueue(namespace, args.queue, args.job, args.super_batch_id .. '/' .. args.shard_id, deadline)
return 1
