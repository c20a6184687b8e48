-- Loaded before scripts that add or remove waiting shards: the model queues, and which shard of one is next.
--
-- There is a model queue for each version of a reference model. Jobs share it by weight (start-time fair queueing, as in
-- fair_queueing.py, which this follows step by step); inside a job the earliest deadline is first. Keys of a queue:
--
--   waiting_jobs:QUEUE  zset    jobs with waiting shards, by the virtual time at which their next shard may start
--   idle_jobs:QUEUE     zset    jobs without, as long as that time is still to come
--   virtual_time:QUEUE  string  the virtual start time of the shard claimed last
--   waiting:QUEUE:JOB   zset    ID/SHARD by deadline (s)
--   wakeup:QUEUE        list    an entry for each shard that arrived, so that scorers can wait for one
local QUEUE_LIVES_MS = 3600 * 1000

local function activate_job(namespace, queue, job)
  local waiting, idle = namespace .. 'waiting_jobs:' .. queue, namespace .. 'idle_jobs:' .. queue
  if not redis.call('ZSCORE', waiting, job) then
    local now = redis.call('GET', namespace .. 'virtual_time:' .. queue)
    if not now then
      now = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')[2] or '0'
    end
    local own = redis.call('ZSCORE', idle, job) or '0'
    redis.call('ZADD', waiting, tonumber(own) > tonumber(now) and own or now, job)
    redis.call('ZREM', idle, job)
  end
end

local function deactivate_job_if_empty(namespace, queue, job)
  local waiting, idle = namespace .. 'waiting_jobs:' .. queue, namespace .. 'idle_jobs:' .. queue
  if redis.call('EXISTS', namespace .. 'waiting:' .. queue .. ':' .. job) == 0 then
    local start = redis.call('ZSCORE', waiting, job)
    if start then
      redis.call('ZREM', waiting, job)
      redis.call('ZADD', idle, start, job)
      redis.call('PEXPIRE', idle, QUEUE_LIVES_MS)
    end
  end
end

-- Adds a shard (ID/SHARD) of a job and wakes a scorer that waits.
local function enqueue(namespace, queue, job, shard, deadline)
  redis.call('ZADD', namespace .. 'waiting:' .. queue .. ':' .. job, deadline, shard)
  activate_job(namespace, queue, job)
  local wakeup = namespace .. 'wakeup:' .. queue
  redis.call('LPUSH', wakeup, 1)
  redis.call('LTRIM', wakeup, 0, 63)
  redis.call('PEXPIRE', wakeup, QUEUE_LIVES_MS)
end

-- Removes a waiting shard without charging its job.
local function dequeue(namespace, queue, job, shard)
  redis.call('ZREM', namespace .. 'waiting:' .. queue .. ':' .. job, shard)
  deactivate_job_if_empty(namespace, queue, job)
end

-- Removes the next shard and charges its job; returns JOB/ID/SHARD, or nil if none waits.
local function take_next(namespace, queue, weights)
  local waiting, idle = namespace .. 'waiting_jobs:' .. queue, namespace .. 'idle_jobs:' .. queue
  local head = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')
  if #head == 0 then
    return nil
  end
  local job, start = head[1], head[2]
  local shard = redis.call('ZPOPMIN', namespace .. 'waiting:' .. queue .. ':' .. job)[1]
  local weight = redis.call('HGET', weights, job) or '1'
  redis.call('SET', namespace .. 'virtual_time:' .. queue, start, 'PX', QUEUE_LIVES_MS)
  redis.call('ZREMRANGEBYSCORE', idle, '-inf', start)
  redis.call('ZADD', waiting, string.format('%.17g', tonumber(start) + 1 / tonumber(weight)), job)
  deactivate_job_if_empty(namespace, queue, job)
  return job .. '/' .. shard
end

