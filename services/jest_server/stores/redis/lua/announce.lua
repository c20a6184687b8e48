-- Publishes that a version of a reference model is served, and records since when; forgets versions not served for long.
--
-- KEYS 1 versions of the model (hash)  2 models (set)
-- ARGV 1 {model, version, ttl_ms, kept_ms: how long a version that is not served is remembered} (JSON)  2 info (JSON)
local versions, models = KEYS[1], KEYS[2]
local args = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local since_ms = now_ms
for _, version in ipairs(redis.call('HKEYS', versions)) do
  local known = cjson.decode(redis.call('HGET', versions, version))
  if version == args.version then
    since_ms = known.since_ms
  elseif known.until_ms + args.kept_ms < now_ms then
    redis.call('HDEL', versions, version)
  end
end
local record = {since_ms = since_ms, until_ms = now_ms + args.ttl_ms, info = ARGV[2]}
redis.call('HSET', versions, args.version, cjson.encode(record))
redis.call('PEXPIRE', versions, args.ttl_ms + args.kept_ms)
redis.call('SADD', models, args.model)
