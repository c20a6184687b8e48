-- Registers one rank's rows; the first rank's call puts the super-batch in flight. Needs usage.
--
-- Its first write is one that Redis refuses when its memory is full: then nothing is stored.
--
-- KEYS 1 super-batch (hash)  2 decision (string)  3 dead letters (hash)  4 in flight (zset)  5 counters (hash)  6 jobs (hash)
--      7 usage (hash)  8 current attempt (hash)
-- ARGV 1 {job, super_batch_id, rank, attempt: its number, digest, rows, world_size, step, reference (JSON), queue, now_s,
--      deadline_s, ttl_ms, limits: {job, tenant, server} of super-batches in flight, 0 for none} (JSON)  2 submission (JSON)
-- Returns {status}: "decided", "dead" or "no_job"; {"superseded", number, opened_by} or {"no_attempt", number}; "job", "tenant" or "server" if that is full. If the super-batch is in
-- flight, {"accepted", "repeated" or "conflict", pinned reference (JSON), pinned step}, and for "repeated" the
-- positions (JSON) of each upload of this rank.
local super_batch, decision, dead_letters, in_flight, counters, jobs, usage, attempt = unpack(KEYS)
local args = cjson.decode(ARGV[1])
local job, id, rank = args.job, args.super_batch_id, args.rank
local member = job .. '/' .. id

local function with_pinned(status)
  return {status, redis.call('HGET', super_batch, 'reference'), redis.call('HGET', super_batch, 'step')}
end

if redis.call('HEXISTS', jobs, job) == 0 then
  return {'no_job'}
end
if redis.call('EXISTS', decision) == 1 then
  return {'decided'}
end
if args.attempt ~= '0' then
  local number = tonumber(redis.call('HGET', attempt, 'number') or 0)
  if tonumber(args.attempt) > number then
    return {'no_attempt', number}
  end
  if tonumber(args.attempt) < number then
    return {'superseded', number, redis.call('HGET', attempt, 'opened_by')}
  end
end
if redis.call('HEXISTS', dead_letters, id) == 1 then
  return {'dead'}
end
if not redis.call('ZSCORE', in_flight, member) then
  local full = first_exceeded(usage, 'super_batches', job, 1, args.limits)
  if full then
    return {full}
  end
  redis.call('HSET', super_batch, 'world_size', args.world_size, 'reference', args.reference, 'created_at', args.now_s)
  redis.call('HSET', super_batch, 'step', args.step, 'queue', args.queue)
  redis.call('ZADD', in_flight, args.deadline_s, member)
  redis.call('HINCRBY', counters, 'submitted', 1)
  redis.call('HINCRBY', counters, 'in_flight', 1)
  add_usage(usage, 'super_batches', job, id, 1)
elseif redis.call('HGET', super_batch, 'world_size') ~= args.world_size
  or redis.call('HGET', super_batch, 'step') ~= args.step then
  return with_pinned('conflict')
end
local earlier = redis.call('HGET', super_batch, 'digest:' .. rank)
if earlier and earlier ~= args.digest then
  return with_pinned('conflict')
end
if earlier then
  local answer, uploads_of_rank = with_pinned('repeated'), 'upload:' .. rank .. ':'
  for _, field in ipairs(redis.call('HKEYS', super_batch)) do
    if string.sub(field, 1, #uploads_of_rank) == uploads_of_rank then
      answer[#answer + 1] = redis.call('HGET', super_batch, field)
    end
  end
  return answer
end
redis.call('HSET', super_batch, 'digest:' .. rank, args.digest, 'rank:' .. rank, ARGV[2], 'rows:' .. rank, args.rows)
redis.call('PEXPIRE', super_batch, args.ttl_ms)
return with_pinned('accepted')
