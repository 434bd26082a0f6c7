import Foundation
import Testing

@testable import ApertusCore

/// What Python has computed on this machine: `python -m tests.swift_fixtures OUT`.
enum Fixtures {
    static var folder: URL {
        get throws {
            guard let path = ProcessInfo.processInfo.environment["APERTUS_FIXTURES"] else {
                throw ApertusError(
                    .usage, "APERTUS_FIXTURES names no folder; see Contributing in docs/swift.md")
            }
            return URL(fileURLWithPath: path, isDirectory: true)
        }
    }

    static func json(_ path: String) throws -> JSON {
        try JSON([UInt8](Data(contentsOf: folder.appendingPathComponent(path))))
    }

    /// The folders below `path`, by name.
    static func folders(_ path: String) throws -> [URL] {
        try FileManager.default.contentsOfDirectory(
            at: folder.appendingPathComponent(path), includingPropertiesForKeys: nil
        ).sorted { $0.lastPathComponent < $1.lastPathComponent }
    }
}

/// How much is compared: the first number where `APERTUS_NIGHTLY` is set, as for the fixtures, else the
/// second.
func sized(_ nightly: Int, _ daily: Int) -> Int {
    ProcessInfo.processInfo.environment["APERTUS_NIGHTLY"]?.isEmpty == false ? nightly : daily
}
