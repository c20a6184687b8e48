-- Loaded before decide, dead_letter and delete_job: what all three do to a super-batch that leaves flight.
--
-- It starts with ZREM, a command that Redis runs when its memory is full, and once a script has written, Redis lets it
-- finish: so a full server can always be relieved.
--
-- keys: super_batch, results, in_flight, shards, news (names of keys), features (what the names of its features start with)
-- Returns false, and changes nothing, if the super-batch was not in flight.
local function let_go(keys, group, job, id)
  if redis.call('ZREM', keys.in_flight, job .. '/' .. id) == 0 then
    return false
  end
  for _, field in ipairs(redis.call('HKEYS', keys.super_batch)) do
    if string.sub(field, 1, 6) == 'shard:' then
      local entry = redis.call('HGET', keys.super_batch, field)
      redis.call('XACK', keys.shards, group, entry)
      redis.call('XDEL', keys.shards, entry)
      redis.call('UNLINK', keys.features .. string.sub(field, 7))
    end
  end
  redis.call('UNLINK', keys.super_batch, keys.results)
  redis.call('XADD', keys.news, 'MAXLEN', '~', 4096, '*', 'job', job, 'id', id)
  return true
end

