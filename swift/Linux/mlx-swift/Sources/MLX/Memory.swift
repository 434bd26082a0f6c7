import CMLXShim

public enum Memory {
    public static var activeMemory: Int { mx_active_memory() }
    public static var cacheMemory: Int { mx_cache_memory() }
    /// Setting it begins anew, whatever the number.
    public static var peakMemory: Int {
        get { mx_peak_memory() }
        set { mx_reset_peak_memory() }
    }
    public static var cacheLimit: Int {
        get {
            let limit = mx_set_cache_limit(mx_cache_memory())
            _ = mx_set_cache_limit(limit)
            return limit
        }
        set { _ = mx_set_cache_limit(newValue) }
    }
    public static var memoryLimit: Int {
        get { mx_memory_limit() }
        set { _ = mx_set_memory_limit(newValue) }
    }
    public static func clearCache() { mx_clear_cache() }
}
