//! `nvme-async copy`: from a file or namespace to a file or namespace.

mod side;

use std::io::Write;
use std::ops::Range;
use std::time::Instant;

use bytes::Bytes;
use clap::Args;
use futures::stream::{self, StreamExt, TryStreamExt};
use indicatif::ProgressBar;

use self::side::Side;
use crate::failure::Failure;
use crate::{block_on, format, progress};

/// Copies a file or namespace to a file or namespace, from its beginning.
///
/// What looks like a URL is one (write ./a:b for a file of the name a:b); all else is the path of a
/// file. A file as the destination is created or replaced; a namespace keeps what lies behind the
/// copy. The copy is durable when the command ends.
#[derive(Args, Clone, Debug)]
pub(crate) struct Arguments {
    /// What to copy: a URL or the path of a file.
    source: String,

    /// Where to: a URL or the path of a file.
    destination: String,

    /// Copy so many bytes only [default: all of the source].
    #[arg(long, value_parser = nvme_async::parse_size)]
    size: Option<u64>,

    /// Read both sides again afterwards, and compare.
    #[arg(long)]
    verify: bool,
}

/// Bytes of a request.
const CHUNK: u64 = 1 << 20;

/// Requests in flight.
const IN_FLIGHT: usize = 16;

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    block_on(async {
        let source = Side::source(&arguments.source).await?;
        let destination = match Side::destination(&arguments.destination).await {
            Ok(destination) => destination,
            Err(failure) => {
                source.discard().await;
                return Err(failure);
            }
        };
        let len = match check(arguments, &source, &destination) {
            Ok(len) => len,
            Err(failure) => {
                destination.discard().await;
                source.discard().await;
                return Err(failure);
            }
        };
        let outcome = copy(arguments, &source, &destination, len).await;
        let closed = side::close(&source, &destination).await;
        outcome.and(closed)
    })
}

/// Checks the request; returns how many bytes to copy. Nothing is written.
fn check(arguments: &Arguments, source: &Side, destination: &Side) -> Result<u64, Failure> {
    let Arguments {
        source: from,
        destination: to,
        ..
    } = arguments;
    if source.is_same_as(destination) {
        return Err(Failure::request(format_args!(
            "{from} and {to} are the same"
        )));
    }
    let len = arguments.size.unwrap_or_else(|| source.len());
    if len > source.len() {
        return Err(Failure::request(format_args!(
            "--size {len} reaches past the end of {from}, {} bytes",
            source.len()
        )));
    }
    if let Some(capacity) = destination.capacity()
        && len > capacity
    {
        return Err(Failure::request(format_args!(
            "{to} is too small: {capacity} bytes, for the {len} bytes of {from}"
        )));
    }
    Ok(len)
}

async fn copy(
    arguments: &Arguments,
    source: &Side,
    destination: &Side,
    len: u64,
) -> Result<(), Failure> {
    let padding = destination.round_up(len) - len;
    if padding > 0 {
        eprintln!(
            "{} ends inside of a logical block of {}: the last {padding} bytes of that block \
             become zero",
            arguments.source, arguments.destination
        );
    }
    let start = Instant::now();
    destination.begin(len).await?;
    let bar = progress::transfer("copying", len);
    let copied = for_each_chunk(len, &bar, |range| copy_chunk(source, destination, range)).await;
    bar.finish_and_clear();
    copied?;
    destination.flush().await?;
    let seconds = start.elapsed().as_secs_f64();
    if arguments.verify {
        let bar = progress::transfer("comparing", len);
        let same = for_each_chunk(len, &bar, |range| compare(source, destination, range)).await;
        bar.finish_and_clear();
        same?;
    }
    let rate = format::bytes((len as f64 / seconds.max(1e-9)) as u64);
    let verified = if arguments.verify { ", verified" } else { "" };
    writeln!(
        std::io::stdout(),
        "copied {} in {seconds:.2} s, {rate}/s{verified}",
        format::bytes(len)
    )?;
    Ok(())
}

/// Calls `f` for all chunks of `len` bytes, with several calls under way, until one fails.
async fn for_each_chunk<F: Future<Output = Result<(), Failure>>>(
    len: u64,
    bar: &ProgressBar,
    f: impl Fn(Range<u64>) -> F,
) -> Result<(), Failure> {
    stream::iter(chunks(len))
        .map(|range| {
            let bytes = range.end - range.start;
            let done = f(range);
            async move { done.await.map(|()| bar.inc(bytes)) }
        })
        .buffer_unordered(IN_FLIGHT)
        .try_collect()
        .await
}

fn chunks(len: u64) -> impl Iterator<Item = Range<u64>> {
    (0..len.div_ceil(CHUNK)).map(move |index| index * CHUNK..((index + 1) * CHUNK).min(len))
}

async fn copy_chunk(source: &Side, destination: &Side, range: Range<u64>) -> Result<(), Failure> {
    let data = source.read(range.clone(), destination).await?;
    let data = pad(data, destination)?;
    destination.write(range.start, data).await
}

/// Lengthens the last chunk, with zeroes, to whole logical blocks of the destination.
fn pad(data: Bytes, destination: &Side) -> Result<Bytes, Failure> {
    let padded = destination.round_up(data.len() as u64) as usize;
    if padded == data.len() {
        return Ok(data);
    }
    let mut buffer = destination.allocate(padded)?;
    buffer[..data.len()].copy_from_slice(&data);
    buffer[data.len()..].fill(0);
    Ok(buffer.into())
}

async fn compare(source: &Side, destination: &Side, range: Range<u64>) -> Result<(), Failure> {
    let written = pad(source.read(range.clone(), destination).await?, destination)?;
    let end = range.start + written.len() as u64;
    let found = destination.read(range.start..end, destination).await?;
    match written
        .iter()
        .zip(&found)
        .position(|(written, found)| written != found)
    {
        None => Ok(()),
        Some(place) => Err(Failure::operation(format_args!(
            "the copy differs from the source at byte {}",
            range.start + place as u64
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_everything_once() {
        for (len, ends) in [
            (0, vec![]),
            (1, vec![1]),
            (CHUNK, vec![CHUNK]),
            (2 * CHUNK + 7, vec![CHUNK, 2 * CHUNK, 2 * CHUNK + 7]),
        ] {
            let mut start = 0;
            for (chunk, end) in chunks(len).zip(&ends) {
                assert_eq!(chunk, start..*end);
                start = *end;
            }
            assert_eq!(chunks(len).count(), ends.len());
        }
    }
}
