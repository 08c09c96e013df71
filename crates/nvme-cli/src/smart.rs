//! `nvme-async smart`: a controller's health, and its last errors.

use std::io::Write as _;

use clap::Args;
use nvme_async::nvme_spec::log::{CriticalWarning, ErrorEntry, SmartHealth};
use nvme_async::{Error, OpenOptions};
use serde::Serialize;

use crate::failure::Failure;
use crate::{block_on, format};

/// Shows a controller's health: temperature, wear, what was read and written, errors.
#[derive(Args, Clone, Debug)]
pub(crate) struct Arguments {
    /// The controller, such as nvme://0000:44:00.0; a namespace in the URL makes no difference.
    url: String,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,

    /// Show the error log too, the newest entry first.
    #[arg(long)]
    errors: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    address: String,
    #[serde(flatten)]
    health: Health,
    /// The newest first.
    #[serde(skip_serializing_if = "Option::is_none")]
    errors: Option<Vec<LoggedError>>,
}

#[derive(Debug, Serialize)]
struct Health {
    critical_warnings: Vec<&'static str>,
    /// Null if it is not reported.
    temperature_celsius: Option<i32>,
    /// Those that there are, the first one's first.
    temperature_sensors_celsius: Vec<i32>,
    available_spare_percent: u8,
    available_spare_threshold_percent: u8,
    /// Of the rated life; it may exceed 100.
    used_percent: u8,
    /// In thousands of 512 bytes, rounded up.
    data_read_bytes: u128,
    data_written_bytes: u128,
    host_read_commands: u128,
    host_write_commands: u128,
    busy_minutes: u128,
    power_cycles: u128,
    power_on_hours: u128,
    unsafe_shutdowns: u128,
    media_errors: u128,
    error_log_entries: u128,
    warning_temperature_minutes: u32,
    critical_temperature_minutes: u32,
}

#[derive(Debug, Serialize)]
struct LoggedError {
    number: u64,
    /// Null if it belongs to no queue.
    queue: Option<u16>,
    /// Null if it belongs to no command.
    command: Option<u16>,
    /// Null if it belongs to no command.
    status: Option<String>,
    /// Null if it belongs to no namespace.
    nsid: Option<u32>,
    /// The first logical block.
    lba: u64,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    block_on(async {
        let controller = OpenOptions::new()
            .url(&arguments.url)
            .queues(1)
            .local_queues(0)
            .open_controller()
            .await?;
        let report = async {
            let health = controller.smart_log().await?;
            let errors = match arguments.errors {
                true => Some(controller.error_log().await?),
                false => None,
            };
            Ok::<_, Error>(Report {
                address: controller.address().to_owned(),
                health: Health::new(&health),
                errors: errors.map(|entries| entries.iter().map(LoggedError::new).collect()),
            })
        };
        let report = report.await;
        let closed = controller.shutdown().await;
        print(&report?, arguments.json)?;
        Ok(closed?)
    })
}

/// By the specification's names.
fn names(warnings: CriticalWarning) -> Vec<&'static str> {
    [
        (warnings.spare(), "available spare below threshold"),
        (warnings.temperature(), "temperature out of range"),
        (warnings.reliability(), "reliability degraded"),
        (warnings.read_only(), "media read only"),
        (
            warnings.volatile_backup(),
            "backup of volatile memory failed",
        ),
        (
            warnings.persistent_memory(),
            "persistent memory region read only or unreliable",
        ),
    ]
    .into_iter()
    .filter_map(|(there, name)| there.then_some(name))
    .collect()
}

/// Of kelvins, of which 0 stands for nothing.
fn celsius(kelvins: u16) -> Option<i32> {
    (kelvins != 0).then(|| i32::from(kelvins) - 273)
}

impl Health {
    fn new(log: &SmartHealth) -> Self {
        let data = |units: u128| units.saturating_mul(512_000);
        Self {
            critical_warnings: names(log.warnings()),
            temperature_celsius: celsius(log.composite_temperature.get()),
            temperature_sensors_celsius: log
                .temperature_sensors
                .iter()
                .filter_map(|kelvins| celsius(kelvins.get()))
                .collect(),
            available_spare_percent: log.available_spare,
            available_spare_threshold_percent: log.available_spare_threshold,
            used_percent: log.percentage_used,
            data_read_bytes: data(log.data_units_read.get()),
            data_written_bytes: data(log.data_units_written.get()),
            host_read_commands: log.host_read_commands.get(),
            host_write_commands: log.host_write_commands.get(),
            busy_minutes: log.controller_busy_time.get(),
            power_cycles: log.power_cycles.get(),
            power_on_hours: log.power_on_hours.get(),
            unsafe_shutdowns: log.unsafe_shutdowns.get(),
            media_errors: log.media_errors.get(),
            error_log_entries: log.error_log_entries.get(),
            warning_temperature_minutes: log.warning_temperature_time.get(),
            critical_temperature_minutes: log.critical_temperature_time.get(),
        }
    }
}

impl LoggedError {
    fn new(entry: &ErrorEntry) -> Self {
        /// Stands for no queue, and for no command.
        const NONE: u16 = 0xffff;
        let some = |number: u16| (number != NONE).then_some(number);
        let command = some(entry.cid.get());
        Self {
            number: entry.error_count.get(),
            queue: some(entry.sqid.get()),
            command,
            status: command.map(|_| entry.status().to_string()),
            nsid: Some(entry.nsid.get()).filter(|&nsid| nsid != 0),
            lba: entry.lba.get(),
        }
    }
}

fn print(report: &Report, json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, report).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        out.write_all(table(report).as_bytes())?;
    }
    Ok(())
}

fn table(report: &Report) -> String {
    let health = &report.health;
    let warnings = match health.critical_warnings.as_slice() {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    let temperature = match health.temperature_celsius {
        Some(celsius) => format!("{celsius} °C"),
        None => "not reported".to_owned(),
    };
    let bytes = |bytes: u128| match u64::try_from(bytes) {
        Ok(bytes) => format::bytes(bytes),
        Err(_) => format!("{bytes} bytes"),
    };
    let mut rows = vec![
        ("critical warnings", warnings),
        ("temperature", temperature),
    ];
    if !health.temperature_sensors_celsius.is_empty() {
        let sensors = health.temperature_sensors_celsius.iter();
        let sensors: Vec<_> = sensors.map(|celsius| format!("{celsius} °C")).collect();
        rows.push(("sensors", sensors.join(", ")));
    }
    rows.extend([
        (
            "available spare",
            format!(
                "{} %, threshold {} %",
                health.available_spare_percent, health.available_spare_threshold_percent
            ),
        ),
        ("life used", format!("{} %", health.used_percent)),
        ("data read", bytes(health.data_read_bytes)),
        ("data written", bytes(health.data_written_bytes)),
        ("read commands", health.host_read_commands.to_string()),
        ("write commands", health.host_write_commands.to_string()),
        ("busy", format!("{} minutes", health.busy_minutes)),
        ("power cycles", health.power_cycles.to_string()),
        ("power on", format!("{} hours", health.power_on_hours)),
        ("unsafe shutdowns", health.unsafe_shutdowns.to_string()),
        ("media errors", health.media_errors.to_string()),
        ("errors logged", health.error_log_entries.to_string()),
        (
            "too hot",
            format!(
                "{} minutes, and critically so {} minutes",
                health.warning_temperature_minutes, health.critical_temperature_minutes
            ),
        ),
    ]);
    let mut text = format!("{}\n", report.address);
    for (name, value) in rows {
        text += &format!("  {name:<18} {value}\n");
    }
    for error in report.errors.iter().flatten() {
        text += &format!("  {}\n", line(error));
    }
    text
}

fn line(error: &LoggedError) -> String {
    let mut text = format!("error {}", error.number);
    if let Some(queue) = error.queue {
        text += &format!(", queue {queue}");
    }
    if let Some(command) = error.command {
        text += &format!(", command {command:#06x}");
    }
    if let Some(nsid) = error.nsid {
        text += &format!(", namespace {nsid}, LBA {}", error.lba);
    }
    match &error.status {
        Some(status) => text + ": " + status,
        None => text + ": of no command",
    }
}

#[cfg(test)]
mod tests {
    use nvme_async::nvme_spec::Status;

    use super::*;

    fn report(log: &SmartHealth, errors: &[ErrorEntry]) -> Report {
        Report {
            address: "mem:".to_owned(),
            health: Health::new(log),
            errors: Some(errors.iter().map(LoggedError::new).collect()),
        }
    }

    #[test]
    fn in_words_and_units() {
        let mut log = SmartHealth {
            critical_warning: 0b11,
            composite_temperature: 343.into(),
            available_spare: 99,
            available_spare_threshold: 10,
            percentage_used: 120,
            data_units_read: 2_048.into(),
            data_units_written: u128::MAX.into(),
            power_on_hours: 17.into(),
            warning_temperature_time: 5.into(),
            ..SmartHealth::default()
        };
        log.temperature_sensors[1].set(270);
        let text = table(&report(&log, &[]));
        for expected in [
            "available spare below threshold, temperature out of range",
            "temperature        70 °C",
            "sensors            -3 °C",
            "99 %, threshold 10 %",
            "life used          120 %",
            "data read          1000 MiB",
            "17 hours",
            "5 minutes, and critically so 0 minutes",
            &u128::MAX.to_string(),
        ] {
            assert!(text.contains(expected), "{expected:?} is not in:\n{text}");
        }
        let nothing = table(&report(&SmartHealth::default(), &[]));
        assert!(nothing.contains("not reported") && nothing.contains("none"));
    }

    #[test]
    fn errors_of_commands_and_of_none() {
        let read = ErrorEntry {
            error_count: 9.into(),
            sqid: 3.into(),
            cid: 0x12.into(),
            nsid: 1.into(),
            lba: 77.into(),
            ..ErrorEntry::default().with_status(Status::UNRECOVERED_READ_ERROR)
        };
        let doorbell = ErrorEntry {
            error_count: 8.into(),
            sqid: 0xffff.into(),
            cid: 0xffff.into(),
            ..ErrorEntry::default()
        };
        let text = table(&report(&SmartHealth::default(), &[read, doorbell]));
        let line = "error 9, queue 3, command 0x0012, namespace 1, LBA 77: Unrecovered Read Error";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("error 8: of no command"), "{text}");
    }
}
