-- Loaded before scripts that change how much is held: super-batches in flight and bytes of features, of the whole server, of
-- a tenant, of a job, and of a super-batch, in one hash with the fields KIND|, KIND|TENANT~, KIND|JOB/ and KIND|JOB/ID.
local function add_usage(usage, kind, job, id, amount)
  if amount == 0 then
    return
  end
  local levels = {'', job .. '/', job .. '/' .. id, string.match(job, '^[^~]+~')}
  for i = 1, 4 do
    if levels[i] then
      local field = kind .. '|' .. levels[i]
      if redis.call('HINCRBY', usage, field, amount) <= 0 then
        redis.call('HDEL', usage, field)
      end
    end
  end
end

local function used(usage, kind, level)
  return tonumber(redis.call('HGET', usage, kind .. '|' .. level) or '0')
end

-- Returns which limit (0: none) does not allow so much more: "job", "tenant" or "server"; nil if there is room.
local function first_exceeded(usage, kind, job, more, limits)
  local tenant = string.match(job, '^[^~]+~')
  local function exceeds(limit, level)
    return tonumber(limit) > 0 and used(usage, kind, level) + more > tonumber(limit)
  end
  if exceeds(limits.job, job .. '/') then
    return 'job'
  end
  if tenant and exceeds(limits.tenant, tenant) then
    return 'tenant'
  end
  if exceeds(limits.server, '') then
    return 'server'
  end
  return nil
end

