//! The picture: IOPS by those of POSIX, as bars.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use super::report::Comparison;
use crate::vm_bench::WORKLOADS;

/// Of one comparison, in pixels.
const PANEL: (u32, u32) = (960, 360);
const LEGEND: u32 = 34;
/// Between two groups of bars, in bars.
const GAP: f64 = 1.0;

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Draws the ratios of all comparisons, one below the other.
pub(super) fn draw(path: &Path, comparisons: &[Comparison]) -> Result<()> {
    let size = (PANEL.0, PANEL.1 * comparisons.len() as u32);
    let whole = SVGBackend::new(path, size).into_drawing_area();
    whole.fill(&WHITE)?;
    let panels = whole.split_evenly((comparisons.len(), 1));
    for (panel, comparison) in panels.iter().zip(comparisons) {
        let (bars, legend) = panel.split_vertically(PANEL.1 - LEGEND);
        draw_bars(&bars, comparison)?;
        draw_legend(&legend, &comparison.ways)?;
    }
    whole.present()?;
    Ok(())
}

fn draw_bars(area: &Area<'_>, comparison: &Comparison) -> Result<()> {
    // None for POSIX, which is the line that bars begin at.
    let group = (comparison.ways.len() - 1) as f64 + GAP;
    let bars: Vec<(f64, usize, f64)> = bars(comparison, group).collect();
    let ratios = bars.iter().map(|bar| bar.2);
    let (lowest, highest) = (
        ratios.clone().fold(1.0, f64::min),
        ratios.fold(1.0, f64::max),
    );
    let width = group * WORKLOADS.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(
            format!(
                "IOPS by those of {}, {}",
                comparison.ways[0], comparison.title
            ),
            ("sans-serif", 17),
        )
        .margin(8)
        .x_label_area_size(26)
        .y_label_area_size(46)
        .build_cartesian_2d(0.0..width, (lowest / 1.4..highest * 1.4).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .light_line_style(TRANSPARENT)
        .y_label_formatter(&|ratio| format!("{ratio}"))
        .label_style(("sans-serif", 12))
        .draw()?;
    let (number, words) = (("sans-serif", 11), ("sans-serif", 14));
    for (x, way, ratio) in bars {
        let bar = Rectangle::new(
            [(x + 0.06, 1.0), (x + 0.94, ratio)],
            color(way, comparison.ways.len()).filled(),
        );
        chart.draw_series([bar])?;
        let place = chart.backend_coord(&(x + 0.5, ratio));
        let down = if ratio < 1.0 { 3 } else { -13 };
        area.draw_text(
            &format!("{ratio:.2}"),
            &centered(number),
            local(area, place, down),
        )?;
    }
    chart.draw_series([PathElement::new(vec![(0.0, 1.0), (width, 1.0)], BLACK)])?;
    for (index, workload) in WORKLOADS.iter().enumerate() {
        let middle = (index as f64 + 0.5) * group;
        let place = chart.backend_coord(&(middle, lowest / 1.4));
        area.draw_text(
            &workload.to_string(),
            &centered(words),
            local(area, place, 6),
        )?;
    }
    Ok(())
}

/// The left edge of each bar, its way and its ratio.
fn bars(comparison: &Comparison, group: f64) -> impl Iterator<Item = (f64, usize, f64)> {
    let places = (0..WORKLOADS.len())
        .flat_map(|workload| (1..comparison.ways.len()).map(move |way| (workload, way)));
    places.filter_map(move |(workload, way)| {
        let ratio = comparison.ratio(workload, way)?;
        Some((
            workload as f64 * group + GAP / 2.0 + (way - 1) as f64,
            way,
            ratio,
        ))
    })
}

/// A place of the whole picture as one of an area, so much further down.
fn local(area: &Area<'_>, place: (i32, i32), down: i32) -> (i32, i32) {
    let (left, top) = area.get_base_pixel();
    (place.0 - left, place.1 - top + down)
}

fn centered(font: (&'static str, i32)) -> TextStyle<'static> {
    use plotters::style::text_anchor::{HPos, Pos, VPos};
    TextStyle::from(font.into_font()).pos(Pos::new(HPos::Center, VPos::Top))
}

fn draw_legend(area: &Area<'_>, ways: &[&str]) -> Result<()> {
    let style = ("sans-serif", 14).into_font();
    let step = (PANEL.0 as i32 - 60) / (ways.len() as i32 - 1);
    for (way, name) in ways.iter().enumerate().skip(1) {
        let x = 46 + (way as i32 - 1) * step;
        area.draw(&Rectangle::new(
            [(x, 8), (x + 12, 20)],
            color(way, ways.len()).filled(),
        ))?;
        area.draw(&Text::new((*name).to_owned(), (x + 18, 7), style.clone()))?;
    }
    Ok(())
}

/// Of a way that is not POSIX, of so many; ours, the last one, looks alike everywhere.
fn color(way: usize, ways: usize) -> RGBColor {
    const OTHERS: [(u8, u8, u8); 3] = [(107, 174, 214), (158, 158, 158), (33, 113, 181)];
    const OURS: RGBColor = RGBColor(214, 39, 40);
    if way + 1 == ways {
        return OURS;
    }
    let (red, green, blue) = OTHERS[(way - 1) % OTHERS.len()];
    RGBColor(red, green, blue)
}

#[cfg(test)]
mod tests {
    use super::super::figures::Figures;
    use super::*;

    #[test]
    fn there_is_a_bar_for_each_ratio() {
        let mut comparison = Comparison::new("test", vec!["POSIX", "ours"]);
        let figures = |iops| Figures {
            iops,
            p50: 1.0,
            p99: 1.0,
            server_cpu: None,
        };
        comparison.add(1, 0, figures(100.0));
        comparison.add(1, 1, figures(250.0));
        let found: Vec<_> = bars(&comparison, 2.0).collect();
        assert_eq!(found, [(2.5, 1, 2.5)]);

        let path = std::env::temp_dir().join(format!("xtask-bars-{}", std::process::id()));
        draw(&path, &[comparison]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        for expected in ["2.50", "ours", "randrw QD4", "IOPS by those of POSIX, test"] {
            assert!(svg.contains(expected), "{expected} in {svg}");
        }
    }
}
