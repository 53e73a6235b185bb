//! Traces over OTLP: each request is a span, with its queueing, prefill and decoding as children, named and
//! described by OpenTelemetry's conventions for HTTP and for generative AI. Spans are made from the
//! request's [`Record`] when it is over, so that tracing costs nothing while it runs.
//!
//! Spans are handed to a bounded queue and sent by a task of their own; what does not fit is dropped, and
//! nobody waits for a collector. The exporter itself reads the usual `OTEL_*` variables, such as
//! `OTEL_TRACES_SAMPLER` and `OTEL_EXPORTER_OTLP_HEADERS`.

use super::{Record, now};
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{
    Span, SpanContext, SpanKind, Status, TraceContextExt, Tracer, TracerProvider,
};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::runtime::Tokio;
use opentelemetry_sdk::trace::span_processor_with_async_runtime::BatchSpanProcessor;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use std::time::{Duration, SystemTime};

/// Makes spans and sends them.
#[derive(Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// How a request came and how it was answered.
#[derive(Debug)]
pub struct Exchange<'a> {
    /// Its method.
    pub method: &'a str,
    /// The route's pattern, if there is one.
    pub route: Option<&'a str>,
    /// The status that was sent; 499 for a client that left.
    pub status: u16,
    /// The code that a call over gRPC ended with.
    pub grpc: Option<i32>,
}

impl Exchange<'_> {
    /// Whether the server is at fault, as OpenTelemetry counts it.
    fn failed(&self) -> bool {
        // Unknown, deadline, unimplemented, internal, unavailable, data loss.
        self.status >= 500 || self.grpc.is_some_and(|code| [2, 4, 12, 13, 14, 15].contains(&code))
    }
}

/// The span that a caller's headers name, by W3C's `traceparent` and `tracestate`.
pub fn parent(headers: &dyn Extractor) -> Option<SpanContext> {
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), headers);
    let parent = context.span().span_context().clone();
    parent.is_valid().then_some(parent)
}

impl Traces {
    /// Sends spans of `service` to the collector at `endpoint`, as OTLP over HTTP. Must be called inside
    /// a runtime.
    ///
    /// # Errors
    /// What is wrong with the endpoint.
    pub fn start(endpoint: &str, service: &str) -> Result<Self, String> {
        if !endpoint.starts_with("http://") {
            return Err("allowed: an http:// URL, such as http://127.0.0.1:4318".into());
        }
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
            .build()
            .map_err(|error| error.to_string())?;
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter, Tokio).build())
            .with_resource(Resource::builder().with_service_name(service.to_owned()).build())
            .build();
        let tracer = provider.tracer("shoal");
        Ok(Self { provider, tracer })
    }

    /// Makes the spans of a request that is over.
    pub fn record(&self, record: &Record, exchange: &Exchange) {
        let ended = SystemTime::now();
        let began = ended - now().saturating_duration_since(record.arrived);
        let context = match &record.parent {
            Some(parent) => Context::new().with_remote_span_context(parent.clone()),
            None => Context::new(),
        };
        let route = exchange.route.unwrap_or("unknown route");
        let mut span = self
            .tracer
            .span_builder(format!("{} {route}", exchange.method))
            .with_kind(SpanKind::Server)
            .with_start_time(began)
            .with_attributes(attributes(record, exchange))
            .start_with_context(&self.tracer, &context);
        if exchange.failed() {
            span.set_status(Status::error(""));
        }
        let inside = context.with_remote_span_context(span.span_context().clone());
        self.phases(record, began, &inside);
        span.end_with_timestamp(ended);
    }

    /// Where the time of a request went that was worked on.
    fn phases(&self, record: &Record, began: SystemTime, context: &Context) {
        let timing = record.facts().timing;
        let mut at = began;
        for (name, time) in
            [("queue", timing.queue), ("prefill", timing.prefill), ("decode", timing.decode)]
        {
            if time > Duration::ZERO {
                let mut span = self
                    .tracer
                    .span_builder(name)
                    .with_start_time(at)
                    .start_with_context(&self.tracer, context);
                at += time;
                span.end_with_timestamp(at);
            }
        }
    }

    /// Sends what is left. Blocks for it.
    pub fn finish(&self) {
        if let Err(error) = self.provider.shutdown() {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

fn attributes(record: &Record, exchange: &Exchange) -> Vec<KeyValue> {
    let facts = record.facts();
    let mut all = vec![
        KeyValue::new("http.request.method", exchange.method.to_owned()),
        KeyValue::new("http.response.status_code", i64::from(exchange.status)),
        KeyValue::new("shoal.request.id", record.id.clone()),
    ];
    all.extend(exchange.route.map(|route| KeyValue::new("http.route", route.to_owned())));
    if let Some(code) = exchange.grpc {
        all.push(KeyValue::new("rpc.system", "grpc"));
        all.push(KeyValue::new("rpc.grpc.status_code", i64::from(code)));
    }
    match facts.outcome {
        None | Some("ok") => {}
        Some(outcome) => all.push(KeyValue::new("error.type", outcome)),
    }
    let Some(model) = facts.model else { return all };
    all.extend([
        KeyValue::new("gen_ai.operation.name", facts.operation),
        KeyValue::new("gen_ai.provider.name", "shoal"),
        KeyValue::new("gen_ai.request.model", model),
        KeyValue::new("gen_ai.usage.input_tokens", i64::from(facts.usage.prompt_tokens)),
        KeyValue::new("gen_ai.usage.output_tokens", i64::from(facts.usage.completion_tokens)),
        KeyValue::new("shoal.adapters", list(facts.adapters)),
    ]);
    if !facts.finishes.is_empty() {
        let finishes = facts.finishes.iter().map(|finish| finish.as_str().to_owned());
        all.push(KeyValue::new("gen_ai.response.finish_reasons", list(finishes)));
    }
    all
}

fn list(texts: impl IntoIterator<Item = String>) -> Value {
    Value::Array(Array::String(texts.into_iter().map(StringValue::from).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn a_parent_is_read_from_a_well_formed_header_alone() {
        let of =
            |header: &str| parent(&HashMap::from([("traceparent".to_owned(), header.to_owned())]));
        let good = of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").unwrap();
        assert_eq!(good.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(good.span_id().to_string(), "00f067aa0ba902b7");
        for bad in ["", "00-0-0-01", "00-00000000000000000000000000000000-00f067aa0ba902b7-01"] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(parent(&HashMap::new()), None);
    }
}
