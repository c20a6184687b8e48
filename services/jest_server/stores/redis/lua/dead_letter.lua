-- Takes a super-batch out of flight and keeps a dead letter that says why, and for some time its inputs (what its ranks
-- submitted), so that it can be queued again. Needs leave_flight.
--
-- KEYS 1 namespace  2 dead letters (hash)  3 their order (zset)  4 counters (hash)  5 super-batch (hash)
--      6 kept inputs (hash)
-- ARGV 1 {job, super_batch_id, at_s, letters_kept, letters_ms, inputs_kept, inputs_ms: most of them, and how long they live}
--      (JSON)  2 dead letter (JSON)
-- Returns 1, or 0 if the super-batch was not in flight.
local namespace, dead_letters, order, counters, super_batch, kept_inputs = unpack(KEYS)
local args = cjson.decode(ARGV[1])
local job, id = args.job, args.super_batch_id
local inputs = {}
local held = redis.call('HGETALL', super_batch)
for i = 1, #held, 2 do
  local kind = string.match(held[i], '^[^:]*')
  if kind ~= 'shard' and kind ~= 'claimed_by' and kind ~= 'upload' then
    inputs[#inputs + 1] = held[i]
    inputs[#inputs + 1] = held[i + 1]
  end
end
if not leave_flight(namespace, job, id) then
  return 0
end
redis.call('HINCRBY', counters, 'dead_lettered', 1)
redis.call('HINCRBY', counters, 'in_flight', -1)
redis.call('HSET', dead_letters, id, ARGV[2])
redis.call('ZADD', order, args.at_s, id)
for i = 1, #inputs, 1000 do -- a call takes a limited number of arguments
  redis.call('HSET', kept_inputs, unpack(inputs, i, math.min(i + 999, #inputs)))
end
redis.call('PEXPIRE', kept_inputs, args.inputs_ms)
local one_too_many = -1 - args.inputs_kept
for _, old in ipairs(redis.call('ZRANGE', order, one_too_many, one_too_many)) do
  redis.call('UNLINK', namespace .. 'kept_inputs:' .. job .. '/' .. old)
end
for _, old in ipairs(redis.call('ZRANGE', order, 0, -1 - args.letters_kept)) do
  redis.call('HDEL', dead_letters, old)
  redis.call('ZREM', order, old)
end
redis.call('PEXPIRE', dead_letters, args.letters_ms)
redis.call('PEXPIRE', order, args.letters_ms)
return 1
