-- Loaded before whatever changes who waits: the lines in which shards wait for scorers, and whose turn it is there.
--
-- There is a line for each version of a reference model. Jobs take weighted turns in it (start-time fair queueing, as in
-- turns.py, which this follows step by step); inside a job the earliest deadline is first. Names of a line's keys:
--
--   turns:LINE        zset    jobs with shards that wait, by the virtual time of their next turn
--   past_turns:LINE   zset    jobs without, as long as that time is still to come
--   now:LINE          string  the virtual time: that of the turn taken last
--   waiting:LINE:JOB  zset    ID/SHARD by deadline (s)
--   bell:LINE         list    an entry for each shard that came, so that scorers can wait for one
local LIVES_MS = 3600 * 1000

local function joins(prefix, line, job)
  local turns, past = prefix .. 'turns:' .. line, prefix .. 'past_turns:' .. line
  if not redis.call('ZSCORE', turns, job) then
    local now = redis.call('GET', prefix .. 'now:' .. line)
    if not now then
      now = redis.call('ZRANGE', turns, 0, 0, 'WITHSCORES')[2] or '0'
    end
    local own = redis.call('ZSCORE', past, job) or '0'
    redis.call('ZADD', turns, tonumber(own) > tonumber(now) and own or now, job)
    redis.call('ZREM', past, job)
  end
end

local function leaves_if_done(prefix, line, job)
  local turns, past = prefix .. 'turns:' .. line, prefix .. 'past_turns:' .. line
  if redis.call('EXISTS', prefix .. 'waiting:' .. line .. ':' .. job) == 0 then
    local turn = redis.call('ZSCORE', turns, job)
    if turn then
      redis.call('ZREM', turns, job)
      redis.call('ZADD', past, turn, job)
      redis.call('PEXPIRE', past, LIVES_MS)
    end
  end
end

local function put_in_line(prefix, line, job, shard, deadline)
  redis.call('ZADD', prefix .. 'waiting:' .. line .. ':' .. job, deadline, shard)
  joins(prefix, line, job)
  local bell = prefix .. 'bell:' .. line
  redis.call('LPUSH', bell, 1)
  redis.call('LTRIM', bell, 0, 63)
  redis.call('PEXPIRE', bell, LIVES_MS)
end

local function take_out_of_line(prefix, line, job, shard)
  redis.call('ZREM', prefix .. 'waiting:' .. line .. ':' .. job, shard)
  leaves_if_done(prefix, line, job)
end

-- Takes the shard whose turn it is; returns job and shard, or nil if none waits.
local function take_first(prefix, line, weights)
  local turns, past = prefix .. 'turns:' .. line, prefix .. 'past_turns:' .. line
  local head = redis.call('ZRANGE', turns, 0, 0, 'WITHSCORES')
  if #head == 0 then
    return nil
  end
  local job, turn = head[1], head[2]
  local shard = redis.call('ZPOPMIN', prefix .. 'waiting:' .. line .. ':' .. job)[1]
  local weight = redis.call('HGET', weights, job) or '1'
  redis.call('SET', prefix .. 'now:' .. line, turn, 'PX', LIVES_MS)
  redis.call('ZREMRANGEBYSCORE', past, '-inf', turn)
  redis.call('ZADD', turns, string.format('%.17g', tonumber(turn) + 1 / tonumber(weight)), job)
  leaves_if_done(prefix, line, job)
  return job, shard
end

