{{/* Names. The longest suffix is "-selector-headless"; names of Services end at 63 characters. */}}
{{- define "jest.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "jest.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "jest.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What a pod of one component is found by: (dict "root" $ "component" "selector"). */}}
{{- define "jest.selectorLabels" -}}
app.kubernetes.io/name: {{ include "jest.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "jest.labels" -}}
{{ include "jest.selectorLabels" . }}
app.kubernetes.io/part-of: jest-server
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "jest.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "jest.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* registry/repository:tag@digest: (dict "root" $ "image" .Values.selector.image "suffix" "-cuda"). */}}
{{- define "jest.image" -}}
{{- $registry := default .root.Values.image.registry .image.registry -}}
{{- $tag := default (printf "%s%s" (default .root.Chart.AppVersion .root.Values.image.tag) (default "" .suffix)) .image.tag -}}
{{- if $registry }}{{ $registry }}/{{ end -}}
{{- .image.repository }}:{{ $tag }}
{{- with .image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{/* Keys of a pod's spec that all pods have: (dict "root" $ "component" "selector" "values" .Values.selector). */}}
{{- define "jest.podSpec" -}}
serviceAccountName: {{ include "jest.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $labels := include "jest.selectorLabels" . }}
{{- with .values.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ .topologyKey }}
    maxSkew: {{ .maxSkew }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- $labels | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "jest.podMetadata" -}}
labels:
  {{- include "jest.labels" . | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := merge (dict) (default (dict) .annotations) (default (dict) .values.podAnnotations) }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Drain: the endpoint is taken away while preStop sleeps, then the process drains by its own two times. */}}
{{- define "jest.terminationGracePeriodSeconds" -}}
{{- add .preStopSeconds (ceil .delaySeconds) (ceil .graceSeconds) 10 -}}
{{- end -}}

{{- define "jest.lifecycle" -}}
{{- if gt (int .preStopSeconds) 0 -}}
lifecycle:
  preStop:
    sleep:
      seconds: {{ .preStopSeconds }}
{{- end -}}
{{- end -}}

{{/* Native gRPC probes. "liveness" is answered as long as the process works, whatever becomes of Redis and Triton. */}}
{{- define "jest.grpcProbes" -}}
startupProbe:
  grpc:
    port: 50050
    service: liveness
  periodSeconds: 2
  failureThreshold: {{ div (add .startupSeconds 1) 2 }}
livenessProbe:
  grpc:
    port: 50050
    service: liveness
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc:
    port: 50050
  periodSeconds: 3
  timeoutSeconds: 2
  failureThreshold: 2
{{- end -}}

{{/* Environment of our own processes: (dict "root" $ "values" .Values.selector "listen" "0.0.0.0:50051" "metrics" 9101 "serves" true). */}}
{{- define "jest.env" -}}
{{- include "jest.redisEnv" .root }}
- name: JEST_LISTEN
  value: {{ .listen | quote }}
- name: JEST_HEALTH_LISTEN
  value: "0.0.0.0:50050"
- name: JEST_METRICS_LISTEN
  value: {{ printf "0.0.0.0:%v" .metrics | quote }}
- name: JEST_DRAIN_DELAY_S
  value: {{ .values.drain.delaySeconds | quote }}
- name: JEST_GRACE_S
  value: {{ .values.drain.graceSeconds | quote }}
{{- if .serves }}
{{- if ne .root.Values.tls.mode "none" }}
- name: JEST_TLS_CERTIFICATE
  value: /etc/jest/tls/tls.crt
- name: JEST_TLS_KEY
  value: /etc/jest/tls/tls.key
{{- if .root.Values.tls.clientCA.secretName }}
- name: JEST_TLS_CLIENT_CA
  value: {{ printf "/etc/jest/client-ca/%s" .root.Values.tls.clientCA.key | quote }}
{{- end }}
{{- end }}
{{- if .root.Values.auth.tokensSecret.name }}
- name: JEST_TOKENS_FILE
  value: {{ printf "/etc/jest/tokens/%s" .root.Values.auth.tokensSecret.key | quote }}
{{- end }}
{{- if .root.Values.security.allowInsecure }}
- name: JEST_ALLOW_INSECURE
  value: "true"
{{- end }}
{{- end }}
{{- with .root.Values.embeddings.url }}
- name: JEST_EMBEDDINGS_URL
  value: {{ . | quote }}
{{- end }}
{{- if .root.Values.tracing.endpoint }}
- name: JEST_TRACING
  value: "true"
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ .root.Values.tracing.endpoint | quote }}
- name: OTEL_TRACES_SAMPLER
  value: parentbased_traceidratio
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ .root.Values.tracing.ratio | quote }}
{{- end }}
{{- range $name, $value := merge (dict) .values.settings .root.Values.settings }}
- name: {{ $name }}
  value: {{ include "jest.scalar" $value | quote }}
{{- end }}
{{- with .values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Helm reads every number as a float, and would write 4294967296 as 4.294967296e+09. */}}
{{- define "jest.scalar" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end -}}

{{/* Where the two Redis are. Passwords come from Secrets and are put into the URLs by Kubernetes. */}}
{{- define "jest.redisEnv" -}}
{{- $root := . -}}
{{- range $store := list "queue" "cache" }}
{{- $external := index $root.Values.redis.external $store }}
{{- if eq $root.Values.redis.mode "builtin" }}
- name: JEST_{{ upper $store }}_URL
  valueFrom:
    secretKeyRef:
      name: {{ include "jest.fullname" $root }}-redis
      key: {{ $store }}-url
{{- else if $external.urlSecret.name }}
- name: JEST_{{ upper $store }}_URL
  valueFrom:
    secretKeyRef:
      name: {{ $external.urlSecret.name }}
      key: {{ $external.urlSecret.key }}
{{- else }}
{{- if $external.passwordSecret.name }}
- name: {{ upper $store }}_REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ $external.passwordSecret.name }}
      key: {{ $external.passwordSecret.key }}
{{- end }}
{{- if $external.sentinel.passwordSecret.name }}
- name: {{ upper $store }}_SENTINEL_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ $external.sentinel.passwordSecret.name }}
      key: {{ $external.sentinel.passwordSecret.key }}
{{- end }}
- name: JEST_{{ upper $store }}_URL
  value: {{ include "jest.redisUrl" (dict "store" $store "external" $external) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "jest.redisUrl" -}}
{{- $e := .external -}}
{{- $options := list -}}
{{- if $e.tls.caSecret.name -}}
{{- $options = append $options (printf "ssl_ca_certs=/etc/jest/redis/%s/%s" .store $e.tls.caSecret.key) -}}
{{- end -}}
{{- if $e.tls.clientSecret -}}
{{- $options = append $options (printf "ssl_certfile=/etc/jest/redis-client/%s/tls.crt" .store) -}}
{{- $options = append $options (printf "ssl_keyfile=/etc/jest/redis-client/%s/tls.key" .store) -}}
{{- end -}}
{{- if $e.sentinel.username -}}
{{- $options = append $options (printf "sentinel_username=%s" $e.sentinel.username) -}}
{{- end -}}
{{- if $e.sentinel.passwordSecret.name -}}
{{- $options = append $options (printf "sentinel_password=$(%s_SENTINEL_PASSWORD)" (upper .store)) -}}
{{- end -}}
{{- $user := $e.username -}}
{{- if $e.passwordSecret.name -}}
{{- $user = printf "%s:$(%s_REDIS_PASSWORD)" $user (upper .store) -}}
{{- end -}}
{{- $e.tls.enabled | ternary "rediss" "redis" -}}
{{- if $e.sentinel.nodes }}+sentinel{{ end -}}
://
{{- if $user }}{{ $user }}@{{ end -}}
{{- if $e.sentinel.nodes -}}
{{- join "," $e.sentinel.nodes -}}/{{ $e.sentinel.master }}/{{ $e.database }}
{{- else -}}
{{- $e.host -}}:{{ $e.port }}/{{ $e.database }}
{{- end -}}
{{- if $options }}?{{ join "&" $options }}{{ end -}}
{{- end -}}

{{/* Where our own processes look for files: certificates, tokens, embeddings, and a writable folder. */}}
{{- define "jest.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
{{- if .serves }}
{{- if ne .root.Values.tls.mode "none" }}
- name: tls
  mountPath: /etc/jest/tls
  readOnly: true
{{- if .root.Values.tls.clientCA.secretName }}
- name: client-ca
  mountPath: /etc/jest/client-ca
  readOnly: true
{{- end }}
{{- end }}
{{- if .root.Values.auth.tokensSecret.name }}
- name: tokens
  mountPath: /etc/jest/tokens
  readOnly: true
{{- end }}
{{- end }}
{{- if eq .root.Values.redis.mode "external" }}
{{- range $store := list "queue" "cache" }}
{{- $tls := (index $.root.Values.redis.external $store).tls }}
{{- if $tls.caSecret.name }}
- name: redis-{{ $store }}-ca
  mountPath: /etc/jest/redis/{{ $store }}
  readOnly: true
{{- end }}
{{- if $tls.clientSecret }}
- name: redis-{{ $store }}-client
  mountPath: /etc/jest/redis-client/{{ $store }}
  readOnly: true
{{- end }}
{{- end }}
{{- end }}
{{- if .root.Values.embeddings.existingClaim }}
- name: embeddings
  mountPath: {{ .root.Values.embeddings.mountPath }}
  readOnly: true
{{- end }}
{{- with .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "jest.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .values.scratchSize }}
{{- if .serves }}
{{- if ne .root.Values.tls.mode "none" }}
- name: tls
  secret:
    secretName: {{ include "jest.tlsSecret" .root }}
{{- if .root.Values.tls.clientCA.secretName }}
- name: client-ca
  secret:
    secretName: {{ .root.Values.tls.clientCA.secretName }}
{{- end }}
{{- end }}
{{- if .root.Values.auth.tokensSecret.name }}
- name: tokens
  secret:
    secretName: {{ .root.Values.auth.tokensSecret.name }}
{{- end }}
{{- end }}
{{- if eq .root.Values.redis.mode "external" }}
{{- range $store := list "queue" "cache" }}
{{- $tls := (index $.root.Values.redis.external $store).tls }}
{{- if $tls.caSecret.name }}
- name: redis-{{ $store }}-ca
  secret:
    secretName: {{ $tls.caSecret.name }}
{{- end }}
{{- if $tls.clientSecret }}
- name: redis-{{ $store }}-client
  secret:
    secretName: {{ $tls.clientSecret }}
{{- end }}
{{- end }}
{{- end }}
{{- if .root.Values.embeddings.existingClaim }}
- name: embeddings
  persistentVolumeClaim:
    claimName: {{ .root.Values.embeddings.existingClaim }}
    readOnly: true
{{- end }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "jest.tlsSecret" -}}
{{- eq .Values.tls.mode "certManager" | ternary (printf "%s-tls" (include "jest.fullname" .)) .Values.tls.secretName -}}
{{- end -}}

{{- define "jest.tritonUrl" -}}
{{- .Values.triton.enabled | ternary (printf "%s-triton:8001" (include "jest.fullname" .)) .Values.triton.externalUrl -}}
{{- end -}}

{{/* How many selector pods there may be: each has a Service and a name in the certificate. */}}
{{- define "jest.selectorPods" -}}
{{- $s := .Values.selector -}}
{{- $s.autoscaling.enabled | ternary (max $s.replicas $s.autoscaling.maxReplicas) $s.replicas -}}
{{- end -}}

{{/* Rules that no schema of single values can hold. */}}
{{- define "jest.check" -}}
{{- $v := .Values -}}
{{- $serves := or $v.selector.enabled $v.control.enabled -}}
{{- if and $serves (not $v.security.allowInsecure) -}}
{{- if eq $v.tls.mode "none" -}}
{{- fail "\n\nThe selector would speak plain text: set tls.mode to secret or certManager, or, for a trial, security.allowInsecure=true." -}}
{{- end -}}
{{- if not (or $v.auth.tokensSecret.name $v.tls.clientCA.secretName) -}}
{{- fail "\n\nAnybody could call the selector: set auth.tokensSecret.name or tls.clientCA.secretName, or, for a trial, security.allowInsecure=true." -}}
{{- end -}}
{{- end -}}
{{- if and (not $v.triton.enabled) (not $v.triton.externalUrl) (or $v.scorer.enabled $v.embed.enabled) -}}
{{- fail "\n\nScorers need a Triton: set triton.enabled=true, or triton.externalUrl to host:port of one." -}}
{{- end -}}
{{- if and $v.triton.enabled $v.triton.externalUrl -}}
{{- fail "\n\ntriton.externalUrl is set and triton.enabled is true: set one of them." -}}
{{- end -}}
{{- if eq $v.redis.mode "external" -}}
{{- range $store := list "queue" "cache" -}}
{{- $e := index $v.redis.external $store -}}
{{- if not (or $e.urlSecret.name $e.host $e.sentinel.nodes) -}}
{{- fail (printf "\n\nredis.mode is external, but redis.external.%s tells no address: set urlSecret.name, host or sentinel.nodes." $store) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $keda := false -}}
{{- range $c := list $v.selector $v.scorer -}}
{{- if and $c.autoscaling.enabled (gt (int $c.autoscaling.minReplicas) (int $c.autoscaling.maxReplicas)) -}}
{{- fail (printf "\n\nautoscaling.minReplicas (%v) is larger than autoscaling.maxReplicas (%v)." $c.autoscaling.minReplicas $c.autoscaling.maxReplicas) -}}
{{- end -}}
{{- if and $c.autoscaling.enabled (eq $c.autoscaling.kind "keda") -}}{{- $keda = true -}}{{- end -}}
{{- end -}}
{{- if and $keda (not $v.keda.prometheusAddress) -}}
{{- fail "\n\nKEDA asks Prometheus: set keda.prometheusAddress." -}}
{{- end -}}
{{- end -}}

{{/* Resources with the component's GPUs. */}}
{{- define "jest.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int .gpu.count) 0 -}}
{{- $gpu := dict .gpu.resource (int .gpu.count) -}}
{{- $resources = mergeOverwrite $resources (dict "limits" $gpu "requests" $gpu) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "jest.pdb" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "jest.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "jest.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .values.podDisruptionBudget.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "jest.selectorLabels" . | nindent 6 }}
{{- end -}}

{{/* HPA or KEDA's ScaledObject: with "metric" for the HPA and "query" for KEDA, both already rendered. */}}
{{- define "jest.autoscaler" -}}
{{- $a := .values.autoscaling -}}
{{- if eq $a.kind "hpa" -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ include "jest.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "jest.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: {{ .kind }}
    name: {{ include "jest.fullname" .root }}-{{ .component }}
  minReplicas: {{ $a.minReplicas }}
  maxReplicas: {{ $a.maxReplicas }}
  metrics:
    {{- toYaml (list .metric) | nindent 4 }}
  {{- with $a.behavior }}
  behavior:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- else -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ include "jest.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "jest.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: {{ .kind }}
    name: {{ include "jest.fullname" .root }}-{{ .component }}
  pollingInterval: {{ .root.Values.keda.pollingSeconds }}
  minReplicaCount: {{ $a.minReplicas }}
  maxReplicaCount: {{ $a.maxReplicas }}
  {{- with $a.behavior }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- toYaml . | nindent 8 }}
  {{- end }}
  triggers:
    - type: prometheus
      metricType: {{ .metricType }}
      metadata:
        serverAddress: {{ .root.Values.keda.prometheusAddress | quote }}
        query: {{ .query | quote }}
        threshold: {{ .target | quote }}
      {{- with .root.Values.keda.authenticationRef }}
      authenticationRef:
        name: {{ . }}
      {{- end }}
{{- end }}
{{- end -}}

{{- define "jest.redisConf" -}}
port 6379
protected-mode no
dir /data
aclfile /etc/redis/users/users.acl
maxmemory {{ .values.maxMemory }}
save ""
{{- if eq .store "queue" }}
maxmemory-policy noeviction
appendonly yes
appendfsync everysec
{{- else }}
maxmemory-policy allkeys-lru
appendonly no
{{- end }}
{{- end -}}

{{/* Where pods may connect to: (dict "root" $ "redis" true "triton" true "files" true "traces" true). */}}
{{- define "jest.egress" -}}
{{- $root := .root -}}
{{- $n := $root.Values.networkPolicy -}}
- to:
    {{- toYaml $n.dns | nindent 4 }}
  ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- if .redis }}
{{- if eq $root.Values.redis.mode "builtin" }}
- to:
    - podSelector:
        matchLabels:
          app.kubernetes.io/name: {{ include "jest.name" $root }}
          app.kubernetes.io/instance: {{ $root.Release.Name }}
        matchExpressions:
          - {key: app.kubernetes.io/component, operator: In, values: [redis-queue, redis-cache]}
  ports: [{port: 6379, protocol: TCP}]
{{- else }}
{{- with $n.externalRedis }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end }}
{{- if .triton }}
{{- if $root.Values.triton.enabled }}
- to:
    - podSelector:
        matchLabels:
          {{- include "jest.selectorLabels" (dict "root" $root "component" "triton") | nindent 10 }}
  ports: [{port: 8001, protocol: TCP}]
{{- else }}
{{- with $n.externalTriton }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .traces $root.Values.tracing.endpoint }}
{{- with $n.collector }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- if .files }}
{{- with $n.objectStorage }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end -}}
