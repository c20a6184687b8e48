-- Takes the shards whose turn it is into a consumer's hands. Needs turns.
--
-- They enter the stream and the consumer's pending entries in one step: the stream holds exactly what is being scored.
--
-- KEYS 1 shards of the line (stream)  2 weights (hash)
-- ARGV 1 group  2 consumer  3 count  4 prefix of all keys  5 line
-- Returns a list of {entry id, earlier deliveries, job, super-batch id, shard id}.
local stream, group, consumer, prefix, line = KEYS[1], ARGV[1], ARGV[2], ARGV[4], ARGV[5]
local taken = {}
while #taken < tonumber(ARGV[3]) do
  local job, shard = take_first(prefix, line, KEYS[2])
  if not job then
    break
  end
  local id, shard_id = string.match(shard, '^([^/]*)/(.*)$')
  local super_batch = prefix .. 'super_batch:' .. job .. '/' .. id
  local state = redis.call('HGET', super_batch, 'shard:' .. shard_id)
  if state then -- else the backstop took the super-batch
    local earlier = string.match(state, '^waiting:(%d+)$')
    if #taken == 0 then
      local made = redis.pcall('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM')
      if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then
        return made
      end
    end
    local entry = redis.call('XADD', stream, '*', 'job', job, 'id', id, 'shard', shard_id, 'earlier', earlier)
    redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', 1, 'STREAMS', stream, '>')
    redis.call('HSET', super_batch, 'shard:' .. shard_id, entry)
    taken[#taken + 1] = {entry, earlier, job, id, shard_id}
  else
    redis.call('ZREM', prefix .. 'queued', job .. '/' .. shard)
  end
end
return taken
