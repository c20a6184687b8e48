-- Loaded before decide, dead_letter and delete_job: what all three do to a super-batch that leaves flight. Needs turns and
-- usage.
--
-- It starts with ZREM, a command that Redis runs when its memory is full, and once a script has written, Redis lets it
-- finish: so a full server can always be relieved.
--
-- prefix: of all keys. Returns false, and changes nothing, if the super-batch was not in flight.
local function let_go(prefix, group, job, id)
  local member = job .. '/' .. id
  if redis.call('ZREM', prefix .. 'in_flight', member) == 0 then
    return false
  end
  local super_batch, usage = prefix .. 'super_batch:' .. member, prefix .. 'usage'
  local line = redis.call('HGET', super_batch, 'line') or ''
  local stream = prefix .. 'shards:' .. line
  for _, field in ipairs(redis.call('HKEYS', super_batch)) do
    if string.sub(field, 1, 6) == 'shard:' then
      local shard_id, state = string.sub(field, 7), redis.call('HGET', super_batch, field)
      if string.sub(state, 1, 8) == 'waiting:' then
        take_out_of_line(prefix, line, job, id .. '/' .. shard_id)
      else
        redis.call('XACK', stream, group, state)
        redis.call('XDEL', stream, state)
      end
      redis.call('ZREM', prefix .. 'queued', member .. '/' .. shard_id)
      redis.call('UNLINK', prefix .. 'features:' .. member .. '/' .. shard_id)
    end
  end
  account(usage, 'super_batches', job, id, -1)
  account(usage, 'bytes', job, id, -used(usage, 'bytes', member))
  redis.call('UNLINK', super_batch, prefix .. 'results:' .. member)
  redis.call('XADD', prefix .. 'news', 'MAXLEN', '~', 4096, '*', 'job', job, 'id', id)
  return true
end

