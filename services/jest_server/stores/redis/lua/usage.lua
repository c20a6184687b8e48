-- Loaded before whatever changes how much is held: super-batches in flight and bytes of features, of the whole server, of a
-- tenant, of a job, and of a super-batch, in one hash with the fields KIND|, KIND|TENANT~, KIND|JOB/ and KIND|JOB/ID.
local function account(usage, kind, job, id, amount)
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

-- Returns whose limit (0: none) does not allow so much more: "job", "tenant" or "server"; nil if there is room.
local function who_is_full(usage, kind, job, more, limits)
  local tenant = string.match(job, '^[^~]+~')
  if limits.job > 0 and used(usage, kind, job .. '/') + more > limits.job then
    return 'job'
  end
  if tenant and limits.tenant > 0 and used(usage, kind, tenant) + more > limits.tenant then
    return 'tenant'
  end
  if limits.server > 0 and used(usage, kind, '') + more > limits.server then
    return 'server'
  end
  return nil
end

