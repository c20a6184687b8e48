-- Loaded before scripts that hand out, keep or end claims: which consumer is scoring which shard.
--
-- A claimed shard is in heartbeats:QUEUE (zset, JOB/ID/SHARD by its last heartbeat in µs of this server's clock). The hash of
-- its super-batch has the fields shard:SHARD, how often it was delivered, and claimed_by:SHARD, its consumer. A waiting shard
-- has the first of these fields alone.
local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function split_member(member)
  local job, id, shard_id = string.match(member, '^([^/]*)/([^/]*)/(.*)$')
  return job, id, shard_id
end

-- Starts a shard's idle time anew. ZREM is first, a command that Redis runs when its memory is full; once a script has
-- written, Redis lets it finish: so on a full server scorers keep their claims.
local function touch(heartbeats, member, now)
  redis.call('ZREM', heartbeats, member)
  redis.call('ZADD', heartbeats, now, member)
end

-- Removes a shard whose super-batch or features expired; returns whether it did.
local function drop_if_expired(namespace, heartbeats, member)
  local job, id, shard_id = split_member(member)
  if redis.call('HEXISTS', namespace .. 'super_batch:' .. job .. '/' .. id, 'shard:' .. shard_id) == 1
    and redis.call('EXISTS', namespace .. 'features:' .. member) == 1 then
    return false
  end
  redis.call('ZREM', heartbeats, member)
  redis.call('ZREM', namespace .. 'queued', member)
  return true
end

-- Makes a shard the consumer's, one more delivery.
-- Returns {job, super-batch id, shard id, deliveries, time of queueing (ms), features}.
local function deliver(namespace, heartbeats, consumer, member, now)
  local job, id, shard_id = split_member(member)
  local super_batch = namespace .. 'super_batch:' .. job .. '/' .. id
  touch(heartbeats, member, now)
  redis.call('HSET', super_batch, 'claimed_by:' .. shard_id, consumer)
  local deliveries = redis.call('HINCRBY', super_batch, 'shard:' .. shard_id, 1)
  local queued_ms = redis.call('ZSCORE', namespace .. 'queued', member)
  return {job, id, shard_id, deliveries, queued_ms, redis.call('GET', namespace .. 'features:' .. member)}
end

