//! A matrix with names on both sides, for people: an aligned table for the terminal, a heat map as SVG.

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

/// Numbers from 0 to 1.
pub struct Matrix {
    /// What they are.
    pub title: String,
    /// A name for each row.
    pub rows: Vec<String>,
    /// A name for each column.
    pub columns: Vec<String>,
    /// `[rows, columns]`.
    pub values: Vec<Vec<f64>>,
    /// Whether a row's numbers are shares of a whole; else each is 0 or 1.
    pub shares: bool,
}

/// What the narrow columns and all rows take in a picture, in pixels.
const CELL: (i32, i32) = (52, 24);
/// Around each matrix, and around the names of its rows.
const MARGIN: i32 = 16;
/// Of a letter, about.
const LETTER: i32 = 8;

impl Matrix {
    /// Title, names and numbers, a line each; shares with their evenness behind.
    pub fn table(&self) -> String {
        let mut head = vec![String::new()];
        head.extend(self.columns.iter().cloned());
        head.extend(self.shares.then(|| "entropy".to_owned()));
        let mut lines = vec![head];
        for (name, values) in self.rows.iter().zip(&self.values) {
            let mut line = vec![name.clone()];
            line.extend(values.iter().map(|value| self.number(*value, 3)));
            line.extend(self.shares.then(|| self.number(evenness(values), 3)));
            lines.push(line);
        }
        let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
        let mut text = format!("{}\n", self.title);
        for line in &lines {
            text += &format!("  {:<1$}", line[0], widths[0]);
            for (cell, width) in line.iter().zip(&widths).skip(1) {
                text += &format!("  {cell:>width$}");
            }
            text.push('\n');
        }
        text
    }

    fn number(&self, value: f64, digits: usize) -> String {
        format!("{value:.0$}", if self.shares { digits } else { 0 })
    }

    /// Width of a column in pixels.
    fn column(&self) -> i32 {
        CELL.0.max(longest(&self.columns) + LETTER)
    }

    /// Where the first column begins.
    fn left(&self) -> i32 {
        2 * MARGIN + longest(&self.rows)
    }

    fn size(&self) -> (i32, i32) {
        let title = self.title.len() as i32 * LETTER;
        let cells = self.left() + self.columns.len() as i32 * self.column();
        (cells.max(title) + MARGIN, MARGIN + (self.rows.len() as i32 + 2) * CELL.1)
    }

    /// Draws it at the height `top`; the darkest field has its largest number.
    fn draw(&self, area: &DrawingArea<SVGBackend<'_>, Shift>, top: i32) -> Result<()> {
        let text = |text: &str, style: (i32, HPos, &RGBColor), x, row| {
            let (size, side, colour) = style;
            let style = TextStyle::from(("sans-serif", size).into_font()).color(colour);
            let y = top + MARGIN + row * CELL.1 + CELL.1 / 2;
            area.draw_text(text, &style.pos(Pos::new(side, VPos::Center)), (x, y))
        };
        text(&self.title, (18, HPos::Left, &BLACK), MARGIN, 0)?;
        let (left, width) = (self.left(), self.column());
        let starts = || (left..).step_by(width as usize);
        for (x, name) in starts().zip(&self.columns) {
            text(name, (15, HPos::Center, &BLACK), x + width / 2, 1)?;
        }
        let most = self.values.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
        for (row, (name, values)) in (2..).zip(self.rows.iter().zip(&self.values)) {
            text(name, (15, HPos::Right, &BLACK), left - LETTER, row)?;
            for (x, &value) in starts().zip(values) {
                let (y, depth) = (top + MARGIN + row * CELL.1, value / most);
                let field = [(x, y), (x + width - 1, y + CELL.1 - 1)];
                area.draw(&Rectangle::new(field, shade(depth).filled()))?;
                let ink = if depth > 0.5 { &WHITE } else { &BLACK };
                text(&self.number(value, 2), (14, HPos::Center, ink), x + width / 2, row)?;
            }
        }
        Ok(())
    }
}

fn longest(names: &[String]) -> i32 {
    names.iter().map(|name| name.len() as i32 * LETTER).max().unwrap_or(0)
}

/// White for 0, dark blue for 1.
fn shade(depth: f64) -> RGBColor {
    let blend = |full: f64| (255.0 + (full - 255.0) * depth).round() as u8;
    RGBColor(blend(8.0), blend(64.0), blend(129.0))
}

/// The entropy of shares over that of equal ones: 1 if they are equal, 0 if one has all.
pub fn evenness(shares: &[f64]) -> f64 {
    if shares.len() < 2 {
        return 1.0;
    }
    let entropy: f64 = shares.iter().filter(|&&p| p > 0.0).map(|p| p * (1.0 / p).ln()).sum();
    entropy / (shares.len() as f64).ln()
}

/// Writes a picture of the matrices, one below the other.
///
/// # Errors
/// That the file cannot be written.
pub fn write(matrices: &[Matrix], path: &Path) -> Result<()> {
    let sizes = || matrices.iter().map(Matrix::size);
    let size = (sizes().map(|size| size.0).max(), sizes().map(|size| size.1).sum::<i32>());
    let size = (size.0.unwrap_or(0) as u32, (size.1 + MARGIN) as u32);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE)?;
        let mut top = 0;
        for matrix in matrices {
            matrix.draw(&area, top)?;
            top += matrix.size().1;
        }
        area.present()?;
    }
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evenness_is_the_entropy_of_shares() {
        assert_eq!(evenness(&[1.0]), 1.0);
        assert_eq!(evenness(&[0.0, 1.0]), 0.0);
        assert!((evenness(&[0.25; 4]) - 1.0).abs() < 1e-12);
        assert!((evenness(&[0.5, 0.5, 0.0, 0.0]) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn tables_are_aligned() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let matrix = Matrix {
            title: "use".into(),
            rows: names(&["image", "all"]),
            columns: names(&["0", "12345678"]),
            values: vec![vec![1.0, 0.0], vec![0.5, 0.5]],
            shares: true,
        };
        let expected = "use\n             0  12345678  entropy\n  image  1.000     0.000    0.000\n  \
                        all    0.500     0.500    1.000\n";
        assert_eq!(matrix.table(), expected);
        let choices = Matrix { shares: false, ..matrix };
        assert!(choices.table().contains("\n  image  1         0\n"), "{}", choices.table());
    }
}
