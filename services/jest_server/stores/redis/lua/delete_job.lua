-- Deletes a job and all that belongs to it. Needs leave_flight. It may have very many decisions: a call deletes no more than a
-- batch of them, so that other callers wait only briefly, and the last call deletes the job itself with all the rest at once.
--
-- KEYS 1 namespace  2 jobs (hash)  3 counters (hash)  4 dead letters (hash)  5 their order (zset)
--      6 index of decisions (zset)  7 in flight (zset)  8 weights (hash)  9 model queues (hash)  10 attempt (hash)
--      11 attempt members (zset)
-- ARGV 1 {job, batch} (JSON)
-- Returns "more" if it has to be called again, else "deleted", or "none" if there was no such job.
local namespace, jobs, counters, dead_letters, order, index, in_flight, weights, model_queues, attempt, members = unpack(KEYS)
local args = cjson.decode(ARGV[1])
local job, batch = args.job, tonumber(args.batch)
local decided = redis.call('ZRANGE', index, 0, batch - 1)
for _, id in ipairs(decided) do
  redis.call('UNLINK', namespace .. 'decision:' .. job .. '/' .. id)
end
redis.call('ZREMRANGEBYRANK', index, 0, batch - 1)
if #decided == batch then
  return 'more'
end
local start = job .. '/'
for _, member in ipairs(redis.call('ZRANGE', in_flight, 0, -1)) do
  if string.sub(member, 1, #start) == start then
    leave_flight(namespace, job, string.sub(member, #start + 1))
  end
end
for _, id in ipairs(redis.call('ZRANGE', order, 0, -1)) do
  redis.call('UNLINK', namespace .. 'kept_inputs:' .. job .. '/' .. id)
end
for _, queue in ipairs(redis.call('HKEYS', model_queues)) do
  redis.call('ZREM', namespace .. 'idle_jobs:' .. queue, job)
end
redis.call('UNLINK', counters, dead_letters, order, attempt, members)
redis.call('HDEL', weights, job)
return redis.call('HDEL', jobs, job) == 1 and 'deleted' or 'none'
