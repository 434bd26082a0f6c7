import ApertusCore
import Foundation
import MLX

#if canImport(Darwin)
    import os
#endif

/// The memory of the device, and how much of it this process may take.
enum DeviceMemory {
    /// Where MLX computes.
    static var machine: MemoryTerms.Machine {
        #if canImport(Darwin)
            .gpu
        #else
            .cpu
        #endif
    }

    /// Bytes that a model may take now.
    ///
    /// On iPhone and iPad what the system leaves this process, on a Mac 70 % of the memory it has,
    /// on Linux 90 % of what is free.
    static var available: Int {
        #if os(iOS) || os(visionOS) || os(tvOS) || os(watchOS)
            os_proc_available_memory()
        #elseif os(macOS)
            Int(0.7 * Double(ProcessInfo.processInfo.physicalMemory))
        #else
            Int(0.9 * Double(kilobytes("/proc/meminfo", "MemAvailable:") ?? physical))
        #endif
    }

    /// The most that has been held: by MLX, on Linux by the process.
    static var peak: Int {
        #if os(Linux)
            kilobytes("/proc/self/status", "VmHWM:") ?? Memory.peakMemory
        #else
            Memory.peakMemory
        #endif
    }

    private static var physical: Int { Int(ProcessInfo.processInfo.physicalMemory) }

    /// Bytes that Linux gives in kilobytes on the line that begins with `name`.
    private static func kilobytes(_ path: String, _ name: String) -> Int? {
        guard let text = try? String(contentsOfFile: path, encoding: .utf8) else { return nil }
        let line = text.split(separator: "\n").first { $0.hasPrefix(name) }
        return line.flatMap { $0.split(separator: " ").dropFirst().first }
            .flatMap { Int($0) }.map { $0 * 1024 }
    }
}

/// What MLX holds of the memory, in bytes.
public struct MemoryUse: Sendable, Equatable {
    /// In use: weights, keys and values, what is being computed.
    public let active: Int
    /// Freed, and kept for what comes next.
    public let cached: Int
    /// The most that was in use.
    public let peak: Int
    /// What the plan expects at most.
    public let planned: Int
    /// What the model was allowed to take when it was loaded.
    public let limit: Int

    init(_ plan: MemoryPlan) {
        (active, cached, peak) = (Memory.activeMemory, Memory.cacheMemory, Memory.peakMemory)
        (planned, limit) = (plan.footprint.totalBytes, plan.limitBytes)
    }
}
