-- Joins a process of a rank to the job's current attempt, or opens the next one.
--
-- KEYS 1 jobs (hash)  2 attempt: the current one (hash: number, world_size, parent, parent_step, launch, opened_by, joined,
--      decided, rank:RANK = nonce)  3 members (zset): process:NONCE and launch:LAUNCH by the number of their attempt
-- ARGV 1 {job, rank, world_size, launch, nonce, parent, parent_step: empty for none, parent_number, members_kept} (JSON)
-- Returns {"opened", "joined", "superseded", "mismatch", "unknown_parent" or "no_job", number, opened_by, world_size,
--      parent, parent_step} of the job's current attempt.
local jobs, attempt, members = unpack(KEYS)
local args = cjson.decode(ARGV[1])
if redis.call('HEXISTS', jobs, args.job) == 0 then
  return {'no_job'}
end
local number = tonumber(redis.call('HGET', attempt, 'number') or 0)
local process, launch = 'process:' .. args.nonce, 'launch:' .. args.launch
local slot = 'rank:' .. args.rank

local function answer(status)
  return {status, unpack(redis.call('HMGET', attempt, 'number', 'opened_by', 'world_size', 'parent', 'parent_step'))}
end

local function same_origin()
  local origin = redis.call('HMGET', attempt, 'world_size', 'parent', 'parent_step')
  return origin[1] == args.world_size and origin[2] == args.parent and origin[3] == args.parent_step
end

local function join(status)
  if redis.call('HEXISTS', attempt, slot) == 0 then
    redis.call('HINCRBY', attempt, 'joined', 1)
  end
  redis.call('HSET', attempt, slot, args.nonce)
  redis.call('ZADD', members, number, process)
  return answer(status)
end

local function open()
  if redis.call('HEXISTS', attempt, 'decided') == 0 then
    -- Nothing was trained on in it: its processes are as good as new ones.
    local fields = redis.call('HGETALL', attempt)
    for i = 1, #fields, 2 do
      if string.sub(fields[i], 1, 5) == 'rank:' then
        redis.call('ZREM', members, 'process:' .. fields[i + 1])
      end
    end
  end
  number = number + 1
  redis.call('DEL', attempt)
  redis.call('HSET', attempt, 'number', number, 'world_size', args.world_size, 'parent', args.parent,
    'parent_step', args.parent_step, 'launch', args.launch, 'opened_by', args.rank, 'joined', 0)
  if args.launch ~= '' then
    redis.call('ZADD', members, number, launch)
  end
  redis.call('ZREMRANGEBYRANK', members, 0, -1 - args.members_kept)
  return join('opened')
end

if args.parent ~= '' and (tonumber(args.parent_number) < 1 or tonumber(args.parent_number) > number) then
  return answer('unknown_parent')
end
local of_process = redis.call('ZSCORE', members, process)
if of_process then
  if tonumber(of_process) < number or redis.call('HGET', attempt, slot) ~= args.nonce then
    return answer('superseded')
  end
  return answer(same_origin() and 'joined' or 'mismatch')
end
if args.launch ~= '' then
  local of_launch = redis.call('ZSCORE', members, launch)
  if not of_launch then
    return open()
  end
  if tonumber(of_launch) < number then
    return answer('superseded')
  end
  return same_origin() and join('joined') or answer('mismatch')
end
local current = redis.call('HMGET', attempt, 'launch', 'joined', 'world_size')
if number == 0 or current[1] ~= '' or current[2] == current[3] or not same_origin() then
  return open()
end
return join('joined')
