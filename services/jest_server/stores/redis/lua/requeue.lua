-- Puts a dead-lettered super-batch back in flight as it was submitted, without what was uploaded. Needs usage.
--
-- KEYS 1 dead letters (hash)  2 their order (zset)  3 counters (hash)  4 super-batch (hash)  5 kept inputs (hash)
--      6 in flight (zset)  7 usage (hash)
-- ARGV 1 {job, super_batch_id, reference (JSON), queue, now_s, deadline_s, ttl_ms,
--      limits: {job, tenant, server} of super-batches in flight, 0 for none} (JSON)
-- Returns "requeued", "none" if there is no dead letter, "forgotten" if its inputs are not kept any more; "job", "tenant"
-- or "server" if that is full.
local dead_letters, order, counters, super_batch, kept_inputs, in_flight, usage = unpack(KEYS)
local args = cjson.decode(ARGV[1])
local job, id = args.job, args.super_batch_id
if redis.call('HEXISTS', dead_letters, id) == 0 then
  return 'none'
end
if redis.call('EXISTS', kept_inputs) == 0 then
  return 'forgotten'
end
local full = first_exceeded(usage, 'super_batches', job, 1, args.limits)
if full then
  return full
end
redis.call('HSET', kept_inputs, 'reference', args.reference, 'queue', args.queue, 'created_at', args.now_s)
redis.call('RENAME', kept_inputs, super_batch)
redis.call('PEXPIRE', super_batch, args.ttl_ms)
redis.call('ZADD', in_flight, args.deadline_s, job .. '/' .. id)
redis.call('HDEL', dead_letters, id)
redis.call('ZREM', order, id)
redis.call('HINCRBY', counters, 'dead_lettered', -1)
redis.call('HINCRBY', counters, 'in_flight', 1)
add_usage(usage, 'super_batches', job, id, 1)
return 'requeued'
