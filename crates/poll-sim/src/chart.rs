//! The picture: added latency against CPU time.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

use crate::contest::{CONTENDERS, OURS, Round};

/// What it shows, of all that there is.
const TRACES: [&str; 6] = [
    "10 µs, QD 1",
    "80 µs, QD 1",
    "10 µs, 1 % 2 ms, QD 1",
    "10 µs, QD 32",
    "reads 80 µs, writes 10 µs, QD 4",
    "10 µs, 10 k IOPS",
];
const COLUMNS: usize = 3;
const PANEL: (u32, u32) = (420, 340);
const LEGEND: u32 = 90;
/// Less can't be told apart, and zero has no logarithm; in microseconds.
const LEAST: f64 = 0.03;

/// Draws those of the rounds that it shows, all of one machine.
pub(crate) fn draw(path: &Path, rounds: &[&Round<'_>]) -> Result<()> {
    let rows = TRACES.len().div_ceil(COLUMNS) as u32;
    let size = (PANEL.0 * COLUMNS as u32, PANEL.1 * rows + LEGEND);
    let whole = SVGBackend::new(path, size).into_drawing_area();
    whole.fill(&WHITE)?;
    let (panels, legend) = whole.split_vertically(PANEL.1 * rows);
    let panels = panels.split_evenly((rows as usize, COLUMNS));
    for (panel, name) in panels.iter().zip(TRACES) {
        let round = rounds.iter().find(|round| round.trace.name == name);
        let round = round.with_context(|| format!("`{name}` was not run"))?;
        draw_panel(panel, round)?;
    }
    draw_legend(&legend)?;
    whole.present()?;
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw_panel(panel: &Area<'_>, round: &Round<'_>) -> Result<()> {
    let mut chart = ChartBuilder::on(panel)
        .caption(&round.trace.name, ("sans-serif", 16))
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d((0.3..200.0).log_scale(), (LEAST..200.0).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("CPU time per I/O, µs")
        .y_desc("added latency, µs")
        .label_style(("sans-serif", 12))
        .draw()?;
    for (index, (contender, outcome)) in CONTENDERS.iter().zip(&round.outcomes).enumerate() {
        let color = color(index);
        let cpu = outcome.cpu_per_io() / 1000.0;
        let latency = |percent| (outcome.percentile(percent) as f64 / 1000.0).max(LEAST);
        let (median, tail) = (latency(50.0), latency(99.0));
        let line = vec![(cpu, median), (cpu, tail)];
        let width = if contender.name == OURS { 3 } else { 1 };
        chart.draw_series([PathElement::new(line, color.stroke_width(width))])?;
        let radius = if contender.name == OURS { 6 } else { 4 };
        chart.draw_series([Circle::new((cpu, median), radius, color.filled())])?;
        chart.draw_series([Circle::new((cpu, tail), radius - 2, color.stroke_width(2))])?;
    }
    Ok(())
}

fn draw_legend(legend: &Area<'_>) -> Result<()> {
    let style = ("sans-serif", 14).into_font();
    for (index, contender) in CONTENDERS.iter().enumerate() {
        let (column, row) = ((index % 6) as i32, (index / 6) as i32);
        let (x, y) = (20 + column * 205, 14 + row * 26);
        legend.draw(&Circle::new((x, y), 5, color(index).filled()))?;
        legend.draw(&Text::new(contender.name, (x + 12, y - 7), style.clone()))?;
    }
    let text = "Full circles: half of the I/Os are taken at most so much later than the device completed them; \
                empty circles: 99 of 100.";
    legend.draw(&Text::new(text, (20, 64), style))?;
    Ok(())
}

fn color(index: usize) -> RGBColor {
    const COLORS: [(u8, u8, u8); 12] = [
        (214, 39, 40),
        (198, 219, 239),
        (107, 174, 214),
        (33, 113, 181),
        (148, 103, 189),
        (140, 86, 75),
        (255, 187, 120),
        (255, 127, 14),
        (188, 100, 10),
        (44, 160, 44),
        (127, 127, 127),
        (0, 0, 0),
    ];
    let (red, green, blue) = COLORS[index % COLORS.len()];
    RGBColor(red, green, blue)
}
