-- Loaded before decide, dead_letter and delete_job: what all three do to a super-batch that leaves flight. Needs fair_queue
-- and usage.
--
-- It starts with ZREM, a command that Redis runs when its memory is full, and once a script has written, Redis lets it
-- finish: so a full server can always be relieved.
--
-- Returns false, and changes nothing, if the super-batch was not in flight.
local function leave_flight(namespace, job, id)
  local member = job .. '/' .. id
  if redis.call('ZREM', namespace .. 'in_flight', member) == 0 then
    return false
  end
  local super_batch, usage = namespace .. 'super_batch:' .. member, namespace .. 'usage'
  local queue = redis.call('HGET', super_batch, 'queue') or ''
  for _, field in ipairs(redis.call('HKEYS', super_batch)) do
    if string.sub(field, 1, 6) == 'shard:' then
      local shard_id = string.sub(field, 7)
      if redis.call('ZREM', namespace .. 'heartbeats:' .. queue, member .. '/' .. shard_id) == 0 then
        dequeue(namespace, queue, job, id .. '/' .. shard_id)
      end
      redis.call('ZREM', namespace .. 'queued', member .. '/' .. shard_id)
      redis.call('UNLINK', namespace .. 'features:' .. member .. '/' .. shard_id)
    end
  end
  add_usage(usage, 'super_batches', job, id, -1)
  add_usage(usage, 'bytes', job, id, -used(usage, 'bytes', member))
  redis.call('UNLINK', super_batch, namespace .. 'results:' .. member)
  redis.call('XADD', namespace .. 'events', 'MAXLEN', '~', 4096, '*', 'job', job, 'id', id)
  return true
end

