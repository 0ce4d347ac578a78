-- The request of a load, and wrk's figures as one line that can be read without guessing at units.
-- Arguments: the method, and the number of bytes of the body, in pieces of 16.

function init(args)
   wrk.method = args[1]
   if wrk.method == "POST" then
      wrk.body = string.rep("0123456789abcdef", tonumber(args[2]) / 16)
   end
end

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '\nFIGURES {"requests":%d,"bytes":%d,"duration_us":%d,"p50_us":%d,"p99_us":%d,"max_us":%d,' ..
      '"errors":{"connect":%d,"read":%d,"write":%d,"status":%d,"late":%d}}\n',
      summary.requests, summary.bytes, summary.duration, latency:percentile(50),
      latency:percentile(99), latency.max,
      errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
